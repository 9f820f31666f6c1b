"""Training of the concept encoder: from the features of a cut-out subject to what words say about its look."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.checkpoints.load import load_model
from ldm.common.errors import UserError
from ldm.common.paths import resolve_path
from ldm.common.progress import show_progress
from ldm.concepts.fingerprint import BaseModel
from ldm.models.concept_encoder import load_features
from ldm.models.optimization import SharedStepModule, can_use_fused_optimizer, optimizer_and_schedule
from ldm.modules.attention import name_text_layers
from ldm.modules.concept_encoder import ConceptHead
from ldm.modules.encoders.prompts import PromptEncoder
from ldm.modules.losses.nearest_token import nearest_token_loss
from ldm.modules.noun_encodings import mean_encoding, told_moves
from ldm.modules.subject_features import SubjectFeatures, cut_out

SPLITS = {"train": "train", "validation": "val"}  # name of a data set -> prefix of what is logged
SMALLEST = 1e-6


@dataclass(frozen=True)
class EncodedSubjects:
    """What the head is trained with, of each of M subjects.

    Attributes:
        features: (M, F); zeros if the subject is not found.
        is_found: (M,)
        super_inputs: i_super of its kind, (M, d).
        targets: the move that words about its look make, (M, d).
        looks: (M,), the index of its look.
        look_moves: (L, d), the mean of the targets of each look.
    """

    features: Tensor
    is_found: Tensor
    super_inputs: Tensor
    targets: Tensor
    looks: Tensor
    look_moves: Tensor


class ConceptEncoderTrainer(SharedStepModule):
    """Trains the head of a concept encoder on subjects whose kinds and looks are known by words.

    Data sets have the items of `ldm.data.mini.composed_subjects.ComposedSubjects`. Their features are computed once and
    kept in memory. The loss is

        |Delta - told|^2 / s^2  +  lambda_c L_c(Delta)  +  lambda_2 |Delta|^2 / s^2

    where told is the move that words about the look make, s^2 the mean of |told|^2, and L_c `nearest_token_loss`.

    Args:
        base: config of the base model, whose text encoder gives the targets.
        ckpt_path: its weights; None: those that its config names.
        tower: the CLIP whose image tower gives the features, see `load_features`.
        templates: the sentences that i_super is averaged over.
        width, dropout: of the head.
        feature_noise: noise on the features in training, in units of their deviations.
        contrastive: lambda_c.
        l2: lambda_2.
        weight_decay: weight decay of the head's matrices.
        scheduler_config: schedule of the learning rate.
        monitor: name of the logged value that chooses the best checkpoint.

    Attributes:
        base_model: identifies the base model.

    Raises:
        UserError: a param is out of range, or base model or CLIP cannot be loaded.
    """

    def __init__(self, base: str, tower: str, ckpt_path: str | None = None,
                 templates: Sequence[str] = ("a photo of a {}",), width: int = 256, dropout: float = 0.1,
                 feature_noise: float = 0.1, contrastive: float = 0.0, l2: float = 0.0, weight_decay: float = 0.02,
                 scheduler_config: Mapping[str, Any] | None = None, monitor: str | None = None) -> None:
        super().__init__()
        if min(feature_noise, contrastive, l2) < 0:
            raise UserError(f"feature_noise {feature_noise}, contrastive {contrastive}, l2 {l2}: must not be below 0")
        self.tower, self.templates = tower, list(templates)
        self.feature_noise, self.contrastive, self.l2 = feature_noise, contrastive, l2
        self.weight_decay, self.scheduler_config, self.monitor = weight_decay, scheduler_config, monitor
        self.learning_rate = 1e-3
        model = load_model(OmegaConf.load(resolve_path(base)), None if ckpt_path is None else resolve_path(ckpt_path))
        self.base_model = BaseModel.of(name_text_layers(model.model.diffusion_model), model.initial_weights_path)
        features = load_features(tower)
        # In a tuple, since what is not trained belongs in no checkpoint.
        self._frozen: tuple[PromptEncoder, SubjectFeatures] = (model.cond_stage_model, features)
        context_width = model.cond_stage_model.encode_tokens(model.cond_stage_model.tokenize([""])).shape[-1]
        self.head = ConceptHead(features.width, context_width, width, dropout)
        self.encoded: dict[str, EncodedSubjects] = {}

    def setup(self, stage: str | None = None) -> None:
        """Compute the features and targets of all data sets, once."""
        data = self.trainer.datamodule
        for name, split in SPLITS.items():
            if name in data.datasets and split not in self.encoded:
                self.encoded[split] = self._encode(data.datasets[name], data.num_workers, name)
                data.datasets[name].with_pixels = False
        train = self.encoded["train"]
        self.head.set_scale(train.features[train.is_found])
        self._scale = train.targets.square().sum(1).mean()  # s^2

    def _encode(self, dataset: Dataset, num_workers: int, name: str) -> EncodedSubjects:
        encoder, features = self._frozen
        features.to(self.trainer.strategy.root_device)
        rows, kinds, looks = [], [], []
        loader = DataLoader(dataset, 64, num_workers=num_workers, collate_fn=list)
        for items in show_progress(loader, len(loader), f"features of the {name} subjects", "batches"):
            rows.append(_features_of(features, items))
            kinds += [item["kind"] for item in items]
            looks += [item["look"] for item in items]
        table, is_found = (torch.cat(parts) for parts in zip(*rows, strict=True))

        # Each pair of kind and look is encoded once.
        supers = {kind: mean_encoding(encoder, kind, self.templates)[1] for kind in dict.fromkeys(kinds)}
        pairs = list(dict.fromkeys(zip(kinds, looks, strict=True)))
        moves = dict(zip(pairs, told_moves(encoder, *zip(*pairs, strict=True)), strict=True))
        targets = torch.stack([moves[pair] for pair in zip(kinds, looks, strict=True)])
        names = list(dict.fromkeys(looks))
        indices = torch.tensor([names.index(look) for look in looks])
        return EncodedSubjects(
            table, is_found, torch.stack([supers[kind] for kind in kinds]), targets, indices,
            look_moves=torch.stack([targets[indices == index].mean(0) for index in range(len(names))]))

    def step(self, batch: Mapping[str, Any], split: str) -> Tensor:
        known = self.encoded[split]
        rows = batch["index"].cpu()
        rows = rows[known.is_found[rows]]
        features, targets = known.features[rows].to(self.device), known.targets[rows].to(self.device)
        if split == "train":
            features = features + self.feature_noise * self.head.std * torch.randn_like(features)
        moves = self.head(features, known.super_inputs[rows].to(self.device))
        error = (moves - targets).square().sum(1).mean() / self._scale
        loss = error
        if self.l2:
            loss = loss + self.l2 * moves.square().sum(1).mean() / self._scale
        if self.contrastive:
            looks, tokens = known.looks[rows].to(self.device), known.look_moves.to(self.device)
            loss = loss + self.contrastive * nearest_token_loss(moves, tokens, looks)
        moves = moves.detach()
        has_look = targets.norm(dim=1) > SMALLEST
        self.log_dict({
            f"{split}/loss": loss.detach(), f"{split}/error": error.detach(),
            f"{split}/cosine": F.cosine_similarity(moves, targets)[has_look].mean(),
            f"{split}/norm": (moves.norm(dim=1) / targets.norm(dim=1))[has_look].mean(),
        }, prog_bar=True, batch_size=len(rows))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for p in self.head.parameters() if p.ndim > 1]
        others = [p for p in self.head.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": self.weight_decay},
                                       {"params": others, "weight_decay": 0.0}], lr=self.learning_rate,
                                      fused=can_use_fused_optimizer(self))
        return optimizer_and_schedule(optimizer, self.scheduler_config)


def _features_of(features: SubjectFeatures, items: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return the features (B, F) of the subjects of items, and whether each is found in its mask (B,)."""
    cut_outs = [cut_out(item["image"], item["mask"][0], features.size) for item in items]
    is_found = torch.tensor([pair is not None for pair in cut_outs])
    table = torch.zeros(len(items), features.width)
    found = [pair for pair in cut_outs if pair is not None]
    if found:
        images, masks = (torch.stack(parts).to(features.mean.device) for parts in zip(*found, strict=True))
        table[is_found] = features(images, masks).cpu()
    return table, is_found
