"""Tiny towers and tiny data, made on the spot: no test needs a network or a download."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

if TYPE_CHECKING:
    from captune.config import Config
    from captune.workflow.train import Outcome

# captune is imported by the fixtures, after these words are set.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tests compare with values made on the CPU; those of test_cuda.py are for a card (make test-gpu).
ON_A_CARD = os.environ.get("CAPTUNE_TEST_DEVICE") == "cuda"
if not ON_A_CARD:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)
collect_ignore = [] if ON_A_CARD else ["training/test_cuda.py"]

COLOURS = {
    "red": (200, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 60, 200),
    "yellow": (230, 210, 40),
    "black": (20, 20, 20),
    "white": (240, 240, 240),
}
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caption banks of a test stay in the test."""
    monkeypatch.setenv("CAPTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CAPTUNE_DATA", raising=False)


@pytest.fixture
def shared_data() -> Path:
    """The real photos that measurements use; they are not part of the project."""
    if not SHARED.is_dir():
        pytest.skip("the shared photos are not at ../shared/data")
    return SHARED


def write_scene(path: Path, ground: str, square: str, size: int = 40) -> None:
    """A square of one colour on a ground of another."""
    image = Image.new("RGB", (size, size), COLOURS[ground])
    image.paste(COLOURS[square], (size // 4, size // 4, 3 * size // 4, 3 * size // 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=95)


def write_split(folder: Path, split: str, images: int, captions: int = 5, first: int = 0) -> None:
    """A split of a COCO 2014 folder: scenes of two colours, any number of captions each."""
    pairs = [(g, s) for g in COLOURS for s in COLOURS if g != s]
    forms = (
        "a {s} square on a {g} ground",
        "{g} ground with a {s} square",
        "a square that is {s}, all around is {g}",
        "{s} on {g}",
        "there is {s} upon {g}",
    )
    listed, annotated = [], []
    for number in range(images):
        ground, square = pairs[(first + number) % len(pairs)]
        image_id = 1000 * (first + 1) + number
        name = f"scene_{split}_{image_id:06d}.jpg"
        write_scene(folder / f"{split}2014" / name, ground, square)
        listed.append({"id": image_id, "file_name": name, "width": 40, "height": 40})
        for turn in range(captions):
            text = f"{forms[turn % len(forms)].format(s=square, g=ground)} ({turn})"
            caption_id = 10 * image_id + turn
            annotated.append({"id": caption_id, "image_id": image_id, "caption": text})
    path = folder / "annotations" / f"captions_{split}2014.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": listed, "annotations": annotated}), encoding="utf-8")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """A COCO 2014 folder of 24 training and 8 validation scenes."""
    folder = tmp_path / "squares"
    write_split(folder, "train", 24)
    write_split(folder, "val", 8, first=11)
    return folder


@pytest.fixture
def whole_coco(tmp_path: Path) -> Path:
    """A COCO folder with all Karpathy images (empty files), 12 more of val and 3 of train.

    Annotations stand in another order than the published one, and each image has a sixth caption
    that the 5K protocol leaves out.
    """
    from captune.data.coco import karpathy_ids

    ids = karpathy_ids()
    folder = tmp_path / "coco2014"
    rest = [900_000 + i for i in range(12)]
    val = [*map(int, sorted(ids["test"])), *map(int, sorted(ids["val"])), *rest]
    test_captions = ids["test_captions"].reshape(5000, 5)
    own = {int(i): row.tolist() for i, row in zip(ids["test"], test_captions, strict=True)}
    captions = []
    for image in val:
        numbers = own.get(image, [10**7 + 10 * image + turn for turn in range(5)])
        captions += [(number, image) for number in [10**8 + image, *reversed(numbers)]]
    for split, images, pairs in (
        ("val", val, captions),
        ("train", [1, 2, 3], [(77 + i, i) for i in (1, 2, 3)]),
    ):
        content = {
            "images": [{"id": i, "file_name": f"COCO_{split}2014_{i:012d}.jpg"} for i in images],
            "annotations": [{"id": n, "image_id": i, "caption": f"caption {n}"} for n, i in pairs],
        }
        (folder / f"{split}2014").mkdir(parents=True)
        for image in content["images"]:
            (folder / f"{split}2014" / str(image["file_name"])).touch()
        path = folder / "annotations" / f"captions_{split}2014.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint of ``transformers`` with both towers and a tokenizer of its own."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("tiny-clip")
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(letter + "</w>" for letter in letters)]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    words += ["".join(pair) for pair in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.save_pretrained(folder)
    end, begin = vocabulary["<|endoftext|>"], vocabulary["<|startoftext|>"]
    text = {
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": end,
        "projection_dim": 16,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 16,
    }
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet checkpoint of ``transformers`` for 32-pixel images, 32 features."""
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("tiny-resnet")
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic"
    )
    ResNetModel(config).save_pretrained(folder)
    stated = {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(stated), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_sentence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder: a two-layer BERT with mean pooling, 16 dimensions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-sentence")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    bert = folder / "bert"
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    BertModel(config).save_pretrained(bert)
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(bert)
    transformer = Transformer(str(bert), max_seq_length=32)
    SentenceTransformer(modules=[transformer, Pooling(16)]).save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_config(tiny_resnet: Path, tiny_sentence: Path) -> Config:
    from captune.config import Config

    return Config(
        image_encoder=str(tiny_resnet),
        text_encoder=str(tiny_sentence),
        batch_size=8,
        num_epochs=1,
        image_size=32,
        num_workers=0,
        log_with="none",
    )


@pytest.fixture(scope="session")
def outcome(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One epoch on 24 scenes, and a page on 8 others; nothing may write into its folder."""
    from captune.workflow.train import train

    folder = tmp_path_factory.mktemp("workflow")
    write_split(folder / "squares", "train", 24)
    write_split(folder / "squares", "val", 8, first=11)
    write_split(folder / "squares", "fresh", 6, first=21)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CAPTUNE_CACHE", str(folder / "cache"))
        return train(str(folder / "squares"), config=tiny_config, out=folder / "run")
