"""The reward of a sampled caption: its likeness to the teacher's caption, minus a penalty per fault. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from capsfusion_ray.config.extras import imports_of
from capsfusion_ray.training.config import RewardConfig
from capsfusion_ray.training.metrics import (
    PASTED,
    Cider,
    Example,
    concatenated_share,
    has_good_ending,
    has_repeated_trigram,
    lost_share,
    rouge_l,
    unsupported_share,
    words_of,
)
from capsfusion_ray.training.triples import Triple, passes

with imports_of("train"):
    from sacrebleu.metrics import BLEU


class Reward:
    """The mean of CIDEr-D, ROUGE-L and smoothed sentence BLEU, each divided by its usual value, minus the faults.

    CIDEr counts its document frequencies over the fused captions of the training triples, as Rennie et al. (2017).
    """

    def __init__(self, cfg: RewardConfig, triples: Iterable[Triple]) -> None:
        self.cfg = cfg
        self._cider = Cider(words_of(triple.fused) for triple in triples)
        self._bleu = BLEU(lowercase=True, effective_order=True)

    def __call__(self, triple: Triple, caption: str) -> float:
        """Return the reward of `caption` for the triple's sources, compared with the triple's fused caption. Usually about 1."""
        words, reference = words_of(caption), words_of(triple.fused)
        likeness = (
            self._cider.score(words, reference) / self.cfg.usual_cider
            + rouge_l(words, reference) / self.cfg.usual_rouge_l
            + float(self._bleu.sentence_score(caption, [triple.fused]).score) / 100 / self.cfg.usual_bleu_4
        ) / 3
        return likeness - self.faults(triple, caption)

    def faults(self, triple: Triple, caption: str) -> float:
        """Return the sum of the penalties; 0 for a caption without a fault."""
        cfg = self.cfg
        example = Example(triple.raw, triple.synthetic, caption, triple.fused)
        # The penalty grows from `concatenation_from` on, because a sudden one would teach less. It holds for captions of
        # any length; otherwise filler would avoid it.
        pasted = (concatenated_share(example) - cfg.concatenation_from) / (PASTED - cfg.concatenation_from)
        words = words_of(caption)
        missing = 1 - len(words) / max(1, len(words_of(triple.fused)))
        return (
            cfg.concatenation * min(1.0, max(0.0, pasted))
            + cfg.short * max(0.0, missing)
            + cfg.repeated_trigram * has_repeated_trigram(words)
            + cfg.bad_ending * (not has_good_ending(caption))
            + cfg.lost * lost_share(example)
            + cfg.unsupported * unsupported_share(example)
            + cfg.rejected * (not passes(Triple(triple.raw, triple.synthetic, caption)))
        )
