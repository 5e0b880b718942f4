"""The text that accuracy is measured on is fixed, and pooling follows the model's card."""

from __future__ import annotations

import torch

from benchmarks import minilm


def test_evaluation_sets_and_calibration_sentences_are_distinct_and_do_not_overlap() -> None:
    sets, calibration = minilm.evaluation_sets(), minilm.calibration_sentences()
    assert [len(sentences) for sentences in sets] == [512] * minilm.SETS
    everything = [sentence for sentences in (*sets, calibration) for sentence in sentences]
    assert len(set(everything)) == len(everything) == 512 * minilm.SETS + 300
    assert all(8 <= len(sentence.split()) <= 60 for sentence in everything)


def test_a_full_batch_is_real_text_without_padding() -> None:
    ids, mask = minilm.full_batch(3, 20)
    assert ids.shape == mask.shape == (3, 20)
    assert bool(mask.all())
    assert bool((ids > 0).all())


def test_pooling_ignores_padding_and_answers_length_one() -> None:
    hidden = torch.randn(2, 5, minilm.WIDTH)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    pooled = minilm.pool(hidden, mask)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(pooled[:1], minilm.pool(hidden[:1, :3], mask[:1, :3]))


def test_sentences_keep_their_places_although_batches_are_sorted_by_length() -> None:
    sentences = minilm.evaluation_sentences()[:40]

    def first_token_code(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (
            torch.nn.functional.one_hot(ids[:, 1:2] % minilm.WIDTH, minilm.WIDTH).float().expand(-1, ids.shape[1], -1)
        )

    together = minilm.embed(first_token_code, sentences)
    alone = torch.cat([minilm.embed(first_token_code, [sentence]) for sentence in sentences])
    torch.testing.assert_close(together, alone)
