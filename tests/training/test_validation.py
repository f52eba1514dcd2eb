"""validate against the model's own encoders and the metrics over all captions."""

from __future__ import annotations

import torch

from captune.bank import CaptionBank
from captune.config import Config
from captune.data.dataset import COCOClipDataset
from captune.data.table import CaptionTable
from captune.losses import InfoNCELoss
from captune.metrics import retrieval_metrics
from captune.models import CLIPModel
from captune.training.loader import make_loader
from captune.training.validation import validate


def test_validation_is_loss_and_retrieval_with_all_captions(
    tables: tuple[CaptionTable, CaptionTable], config: Config
) -> None:
    _, val = tables
    model = CLIPModel.from_config(config)
    bank = CaptionBank.build(val.texts(), model.text_encoder, precision="fp32")
    dataset = COCOClipDataset(table=val, image_size=32)
    loader = make_loader(dataset, bank, config, shuffle=False)
    model.train()
    result = validate(model, loader, InfoNCELoss(), config)
    assert model.training  # left as it was found
    model.eval()
    image = model.encode_image([val.path(i) for i in range(8)], precision="fp32")
    expected = retrieval_metrics(
        image, model.encode_text(val.texts()), torch.from_numpy(val.image_of_caption)
    )
    assert {k: result[k] for k in expected} == expected
    assert (result["images"], result["captions"]) == (8, 40)
    assert validate(model, loader, InfoNCELoss(), config) == result
