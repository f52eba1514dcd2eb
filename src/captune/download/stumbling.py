"""What may pass and what will not, of all that goes wrong between here and a web server."""

from __future__ import annotations

import contextlib
import email.utils
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass

import requests
import urllib3

from captune.errors import CaptuneError

# What a server says when it may well answer the same request later.
PASSING = (408, 429, 500, 502, 503, 504)
# How a secure connection ends that breaks; a certificate that is refused is another error.
_CUT_OFF = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError, ConnectionError)


@dataclass(frozen=True)
class Patience:
    """How long a server that stumbles is waited for.

    Attributes:
        attempts: failures in a row, without a byte in between, after which it is given up.
        timeout: seconds to connect, and to wait for the next piece of an answer.
        first_wait: seconds to wait after the first failure; doubled after each further one.
        longest_wait: seconds; also the most that a server's ``Retry-After`` is heeded.
    """

    attempts: int = 8
    timeout: float = 30.0
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def wait(self, failures: int, asked: float = 0.0) -> None:
        """Sleep before the next attempt; ``asked`` are the seconds that the server names."""
        time.sleep(min(max(self.first_wait * 2.0 ** (failures - 1), asked), self.longest_wait))


PATIENCE = Patience()


class StumbleError(Exception):
    """A failure that may pass; ``asked`` are the seconds that the server wants to be left alone."""

    def __init__(self, reason: str, asked: float = 0.0) -> None:
        super().__init__(reason)
        self.asked = asked


def raise_for_status(answer: requests.Response, url: str) -> None:
    """Tell a refusal that may pass from one that will not.

    Raises:
        StumbleError: the server may answer later.
        CaptuneError: it will not, such as 404.
    """
    code = answer.status_code
    if code in PASSING:
        raise StumbleError(f"the server answered {code} {answer.reason}", _retry_after(answer))
    if code >= 400 and code != 416:
        raise CaptuneError(f"{url}: the server answered {code} {answer.reason}")


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the server asks to be left alone: a number or a date."""
    stated = answer.headers.get("Retry-After", "").strip()
    if re.fullmatch("[0-9]+", stated):  # not str.isdigit: "²" is no number to float
        return float(stated)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return email.utils.parsedate_to_datetime(stated).timestamp() - time.time()
    return 0.0


@contextlib.contextmanager
def stumbles(url: str) -> Iterator[None]:
    """Tell what may pass from what will not, among all that requests and urllib3 raise.

    Raises:
        StumbleError: a timeout, a connection refused or broken, a secure one too.
        CaptuneError: an address that cannot be right, a certificate that is not.
    """
    try:
        yield
    except requests.exceptions.SSLError as error:
        if any(isinstance(cause, _CUT_OFF) for cause in _causes(error)):
            raise StumbleError(root_cause(error)) from None
        raise CaptuneError(f"{url}: no secure connection: {root_cause(error)}") from None
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
        urllib3.exceptions.HTTPError,
        TimeoutError,
        ConnectionError,
    ) as error:
        raise StumbleError(root_cause(error)) from None
    except (requests.RequestException, ValueError) as error:
        raise CaptuneError(f"{url}: {root_cause(error)}") from None


def root_cause(error: BaseException) -> str:
    """What the operating system said, below the wraps of two libraries."""
    while nested := error.__cause__ or error.__context__:
        error = nested
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and those it wraps; urllib3 hands some on as arguments only."""
    waiting, seen = [error], set[int]()
    while waiting:
        error = waiting.pop()
        if id(error) not in seen:
            seen.add(id(error))
            yield error
            nested = (error.__cause__, error.__context__, *error.args)
            waiting += [cause for cause in nested if isinstance(cause, BaseException)]
