"""Five true sentences about a demo scene, in the manner of COCO's captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

from captune.data.demo_scenes import Placed, Scene, Thing

# Each pattern's words; {0} is the colour of the ground.
_BACKGROUNDS = {
    "plain": "plain {0} background",
    "gradient": "background fading from {0} to {1}",
    "rows": "background of {0} and {1} horizontal stripes",
    "columns": "background of {0} and {1} vertical stripes",
    "diagonal": "background of {0} and {1} diagonal stripes",
    "checks": "{0} and {1} checked background",
    "dots": "{0} background with {1} dots",
    "grid": "{0} background with {1} grid lines",
    "waves": "{0} background with {1} wavy lines",
    "speckles": "speckled {0} background",
}
_NUMBERS = ("no", "one", "two", "three", "four")
# First letters mislead: an "h" that is not spoken, a "u" that sounds like "you".
_ARTICLES = {"hourglass": "an", "unicorn": "a"}


@dataclass(frozen=True)
class _Group:
    """All things of one kind in a scene."""

    thing: Thing
    members: tuple[Placed, ...]


def write_captions(scene: Scene, things: Sequence[Thing]) -> list[str]:
    """Five different sentences; each says a part of what, how many, where and on what."""
    rng = Random(f"captions/{scene.seed}")
    kinds = dict.fromkeys(placed.thing for placed in scene.placed)
    order = [_Group(things[k], tuple(p for p in scene.placed if p.thing == k)) for k in kinds]
    rng.shuffle(order)
    background = _BACKGROUNDS[scene.pattern].format(*scene.colours)
    found: list[str] = []
    for text in _candidates(rng, order, background):
        sentence = text[0].upper() + text[1:] + "."
        if sentence not in found:
            found.append(sentence)
        if len(found) == 5:
            break
    rng.shuffle(found)
    return found


def _candidates(rng: Random, groups: Sequence[_Group], background: str) -> Iterator[str]:
    everything = _listed(groups)
    turned = _listed(groups[::-1])
    ground = f"{rng.choice(('on', 'against', 'in front of'))} {_article(background)} {background}"
    yield f"{everything} {ground}"
    yield _relation(groups)
    yield _whereabouts(groups)
    yield f"{rng.choice(('a picture of', 'a drawing of', 'an image of'))} {_sized(groups[::-1])}"
    if rng.random() < 0.3:  # people leave things out
        yield f"{_noun(groups[0])} {ground}"
    yield f"there {'is' if len(groups[-1].members) == 1 else 'are'} {turned}"
    yield f"{_article(background)} {background} with {everything}"
    yield f"{turned} can be seen here"


def _relation(groups: Sequence[_Group]) -> str:
    """Two kinds and how they lie to one another, then the third kind if there is one."""
    for one, other in permutations(groups, 2):
        relation = _lies(one.members, other.members)
        if relation:
            rest = [g for g in groups if g not in (one, other)]
            ending = f", with {_listed(rest)}" if rest else ""
            return f"{_noun(one)} {relation} {_noun(other)}{ending}"
    if len(groups) == 1:
        return f"just {_noun(groups[0])}"
    return f"{_noun(groups[0])} together with {_listed(groups[1:])}"


def _lies(ones: Sequence[Placed], others: Sequence[Placed]) -> str | None:
    """How all of `ones` lie to all of `others`, or None where no word fits them all."""
    pairs = [(b.x - a.x, b.y - a.y, (a.size + b.size) / 2) for a in ones for b in others]
    if all(dy > 0.6 * room and abs(dx) < dy for dx, dy, room in pairs):
        return "above"
    if all(-dy > 0.6 * room and abs(dx) < -dy for dx, dy, room in pairs):
        return "below"
    if all(dx > 0.6 * room and abs(dy) < dx for dx, dy, room in pairs):
        return "to the left of"
    if all(-dx > 0.6 * room and abs(dy) < -dx for dx, dy, room in pairs):
        return "to the right of"
    return None


def _whereabouts(groups: Sequence[_Group]) -> str:
    """One kind with its place in the picture, then the other kinds."""
    for group in groups:
        place = _place_words(group.members)
        if place:
            rest = [_noun(g) for g in groups if g is not group]
            return _joined([f"{_noun(group)} {place}", *rest])
    return f"{_listed(groups)} in one picture"


def _place_words(members: Sequence[Placed]) -> str | None:
    across = _third([p.x for p in members])
    down = _third([p.y for p in members])
    if across is None and down is None:
        return None
    if across == 1 and down == 1:
        return "in the middle"
    if across in (0, 2) and down in (0, 2):
        return f"in the {('upper', '', 'lower')[down]} {('left', '', 'right')[across]} corner"
    if across in (0, 2):
        return f"on the {('left', '', 'right')[across]} side"
    if down in (0, 2):
        return f"near the {('top', '', 'bottom')[down]}"
    return None


def _third(values: Sequence[float]) -> int | None:
    """0, 1 or 2 where all values lie in that third of the side, with a gap between; or None."""
    for index, (low, high) in enumerate(((0.0, 0.36), (0.4, 0.6), (0.64, 1.0))):
        if all(low <= value <= high for value in values):
            return index
    return None


def _listed(groups: Sequence[_Group]) -> str:
    """For example "a dog, two cats and a bus"."""
    return _joined([_noun(group) for group in groups])


def _sized(groups: Sequence[_Group]) -> str:
    """Like `_listed`, with "small" or "large" for a kind that differs much from the others."""
    words = []
    for group in groups:
        others = [p.size for g in groups if g is not group for p in g.members]
        words.append(_noun(group, _size_word([p.size for p in group.members], others)))
    return _joined(words)


def _joined(nouns: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(nouns[:-1]), nouns[-1])))


def _noun(group: _Group, size_word: str = "") -> str:
    """For example "two dogs" or "a small dog": the count is always exact."""
    count = len(group.members)
    words = f"{size_word} {group.thing.name if count == 1 else group.thing.plural}".strip()
    return f"{_article(words)} {words}" if count == 1 else f"{_NUMBERS[count]} {words}"


def _size_word(sizes: Sequence[float], others: Sequence[float]) -> str:
    if others and max(sizes) < 0.75 * min(others):
        return "small"
    return "large" if others and min(sizes) > max(others) / 0.75 else ""


def _article(words: str) -> str:
    first = words.split()[0]
    return _ARTICLES.get(first, "an" if first[0].lower() in "aeiou" else "a")
