"""Texts as a tree of prefixes: every prefix once, and the embeddings of the texts computed one by one."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import miniclip
from miniclip import CLIP, prefixes, tokenize


@pytest.fixture
def model(tiny: Path) -> CLIP:
    return miniclip.load(tiny, "cpu", dtype=torch.float64)[0]


def embed_one_by_one(model: CLIP, tokens: Tensor) -> Tensor:
    """Each text alone, every token of it computed: no tree, no cut, no neighbours."""
    model.fast = False
    embeddings = torch.cat([model.encode_text(row[None]) for row in tokens])
    model.fast = True
    return embeddings


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def random_rows(pick: random.Random) -> Tensor:
    """Rows that share beginnings of all lengths, in any order, with anything after their end tokens."""
    rows = [[49406] + [pick.randint(1, 3) for _ in range(pick.randint(0, 20))] for _ in range(pick.randint(1, 40))]
    width = max(map(len, rows)) + 1
    ended = [[*row, 49407, *(pick.randint(0, 49407) for _ in range(width - len(row) - 1))] for row in rows]
    return torch.tensor(ended, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(10))
def test_a_batch_gives_the_embeddings_of_its_texts(model: CLIP, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = random_rows(random.Random(seed))
    expected = embed_one_by_one(model, tokens)
    assert close(model.encode_text(tokens), expected)
    for size in (1, 10, 50):  # nodes in one pass
        monkeypatch.setattr(prefixes, "MAX_NODES", size)
        assert close(model.encode_text(tokens), expected)
    monkeypatch.setattr(prefixes, "MAX_NODES", 10**6)
    monkeypatch.setattr(prefixes, "MAX_POSITIONS", 30)
    assert close(model.encode_text(tokens), expected)


def sees_what_comes_after(tree: prefixes.Tree) -> None:
    tree.mask = torch.ones_like(tree.mask)


def end_is_blind_to_the_beginning(tree: prefixes.Tree) -> None:
    tree.reach = tree.reach.clone()
    tree.reach[..., 0] = False


def follows_its_neighbours_path(tree: prefixes.Tree) -> None:
    tree.path = tree.path.roll(1, dims=0)


def stands_elsewhere(tree: prefixes.Tree) -> None:
    tree.positions = tree.positions.roll(1)


def is_pooled_at_anothers_end(tree: prefixes.Tree) -> None:
    tree.ends = torch.cat([tree.ends[:-1].roll(1), tree.ends[-1:]])


MISTAKES = [sees_what_comes_after, end_is_blind_to_the_beginning, follows_its_neighbours_path, stands_elsewhere]


@pytest.mark.parametrize("mistake", [*MISTAKES, is_pooled_at_anothers_end])
def test_a_mistake_in_the_tree_is_a_wrong_embedding(
    model: CLIP, mistake: Callable[[prefixes.Tree], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would notice it."""
    tokens = random_rows(random.Random(1))
    expected = embed_one_by_one(model, tokens)
    make = prefixes.Tree.of

    def wrong(rows: Tensor, lengths: Tensor) -> prefixes.Tree:
        tree = make(rows, lengths)
        mistake(tree)
        return tree

    monkeypatch.setattr(prefixes.Tree, "of", wrong)
    assert not close(model.encode_text(tokens), expected)


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_holds_every_prefix_once(seed: int) -> None:
    tokens = random_rows(random.Random(seed)).long()
    texts = {tuple(row[: row.index(49407) + 1]) for row in tokens.tolist()}
    distinct = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    rows = pad_sequence([torch.tensor(text) for text in sorted(texts)], batch_first=True, padding_value=-1)
    tree = prefixes.Tree.of(rows, (rows >= 0).sum(dim=1))
    assert int(tree.own.sum()) == len(distinct)
    assert int(tree.ends[-1]) + 1 == len(distinct)
    assert len(tree.tokens) == len(tree.positions) == -(-len(distinct) // prefixes.MULTIPLE) * prefixes.MULTIPLE
    for row, path, end in zip(sorted(texts), tree.path.tolist(), tree.ends.tolist()):
        assert path[len(row) - 1] == end
        assert [tree.tokens[node] for node in path[: len(row)]] == list(row)
        assert [tree.positions[node] for node in path[: len(row)]] == list(range(len(row)))


def test_the_chunks_of_a_batch_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.unique(random_rows(random.Random(5)).long(), dim=0)
    lengths = (rows == 49407).int().argmax(dim=1) + 1
    for size in (1, 7, 100, 10**6):
        monkeypatch.setattr(prefixes, "MAX_NODES", size)
        parts = list(prefixes.chunks(rows, lengths))
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(rows)))
    assert len(parts) == 1


def test_the_blocks_see_each_shared_prefix_once(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tree is for: a hundred prompts of seven tokens are four shared tokens and three of each prompt."""
    seen: list[int] = []
    attend = prefixes.Tree.attend

    def counted(self: prefixes.Tree, q: Tensor, *others: Tensor) -> Tensor:
        seen.append(len(q))
        return attend(self, q, *others)

    monkeypatch.setattr(prefixes.Tree, "attend", counted)
    names = [word for word in miniclip.Tokenizer().decode(range(1000, 3000)).split() if word.isalpha()]
    prompts = [f"a photo of a {name}" for name in sorted(set(names))]
    tokens = tokenize(prompts)
    prompts = [prompt for prompt, row in zip(prompts, tokens) if int(row.argmax()) == 6][:100]
    assert len(prompts) == 100
    model.encode_text(tokenize(prompts))
    assert seen == [-(-(5 + 100 * 2) // prefixes.MULTIPLE) * prefixes.MULTIPLE]


def test_gradients_come_through_the_tree(model: CLIP) -> None:
    tokens = random_rows(random.Random(3))
    gradients = []
    for fast in (True, False):
        model.fast = fast
        model.requires_grad_(True).zero_grad()
        (model.encode_text(tokens) ** 2).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    scale = max(gradient.abs().max() for gradient in gradients[1].values())
    assert all((gradients[0][name] - gradients[1][name]).abs().max() <= 1e-12 * scale for name in gradients[0])
