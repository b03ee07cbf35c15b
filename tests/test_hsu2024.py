from __future__ import annotations

import inspect
import math

import pytest
import torch
import transformers as hf
from helpers import tiny
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

import circuitlens as cl
from circuitlens.cdt import pairs

N_POS, TOL = 5, 1e-8


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> cl.HookedModel:
    """A GPT-2 with 2 layers of 2 heads; biases and norms are random too."""
    sizes = {"vocab_size": 13, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 7}
    marks = {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes | marks | options)).to(
        torch.float64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.6)
            if parameter.ndim == 1:
                parameter.add_(0.3)
    # cl.load checks the hooked view, which the published rules do without: they read the weights.
    return cl.HookedModel(model.to(dtype))


@pytest.fixture(scope="module")
def model() -> cl.HookedModel:
    return small()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(13, (3, N_POS), generator=torch.Generator().manual_seed(1))


def published(model, tokens, sources, means, **options):
    return cl.decompose(model, tokens, sources, means, "hsu2024", **options)


def means_of(model: cl.HookedModel, n_pos: int = N_POS) -> Tensor:
    g = model.geometry
    generator = torch.Generator().manual_seed(2)
    shape = (g.n_layers, n_pos, g.n_heads, g.d_head)
    return 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)


SETS = {
    "nothing": [],
    "one position": [(cl.Head(0, 1), 2)],
    "last position": [(cl.Head(1, 0), -1)],
    "all positions": [(cl.Head(0, 0), None)],
    "two heads": [(cl.Head(0, 0), 1), (cl.Head(0, 1), None)],
    "two layers": [(cl.Head(1, 1), None), (cl.Head(0, 0), 3), (cl.Head(0, 1), 0)],
    "twice the same": [(cl.Head(0, 1), 2), (cl.Head(0, 1), None)],
}
TARGETS = [(cl.Head(1, 1), -1), (cl.Head(0, 0), 3), (cl.Head(1, 0), 2), (cl.Head(0, 1), 2)]


# -- an oracle on lists of floats ------------------------------------------------------------


def gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Oracle:
    """One prompt and one source set, number by number, from the parameters by name."""

    def __init__(self, model: cl.HookedModel, tol: float = TOL, f=gelu) -> None:
        config = model.hf.config
        self.layers, self.heads, self.d = config.n_layer, config.n_head, config.n_embd
        self.d_head = self.d // self.heads
        self.eps, self.tol, self.f = config.layer_norm_epsilon, tol, f
        self.w = {name: value.tolist() for name, value in model.hf.state_dict().items()}

    def share(self, u: float, v: float, b: float) -> tuple[float, float]:
        whole = abs(u) + abs(v) + self.tol
        return b * abs(u) / whole, b * abs(v) / whole

    def lin(self, r, i, name):
        weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        out_r, out_i = [], []
        for k in range(len(bias)):
            u = sum(r[j] * weight[j][k] for j in range(len(r)))
            v = sum(i[j] * weight[j][k] for j in range(len(i)))
            share_r, share_i = self.share(u, v, bias[k])
            out_r.append(u + share_r)
            out_i.append(v + share_i)
        return out_r, out_i

    def ln(self, r, i, name):
        gain, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
        n = len(r)
        x = [r[k] + i[k] for k in range(n)]
        s = math.sqrt(sum(t * t for t in x) / n - (sum(x) / n) ** 2 + self.eps)
        out_r, out_i = [], []
        for k in range(n):
            share_r, share_i = self.share(r[k], i[k], bias[k])
            out_r.append((r[k] - sum(r) / n) / s * gain[k] + share_r)
            out_i.append((i[k] - sum(i) / n) / s * gain[k] + share_i)
        return out_r, out_i

    @staticmethod
    def cancel(r, i):
        out = []
        for a, c in zip(r, i, strict=True):
            if a * c < 0:
                out.append((0.0, a + c) if abs(a) < abs(c) else (a + c, 0.0))
            else:
                out.append((a, c))
        return [a for a, _ in out], [c for _, c in out]

    def act(self, r, i):
        return [self.f(a + c) - self.f(c) for a, c in zip(r, i, strict=True)], [*map(self.f, i)]

    def softmax_row(self, q, keys):
        scores = [sum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
        powers = [math.exp(s / math.sqrt(self.d_head)) for s in scores]
        return [p / sum(powers) for p in powers]

    def attention(self, layer, r, i):
        """z_r and z_i by [position][head]."""
        n = len(r)
        parts = [
            self.lin(
                *self.ln(r[p], i[p], f"transformer.h.{layer}.ln_1"),
                f"transformer.h.{layer}.attn.c_attn",
            )
            for p in range(n)
        ]

        def piece(p, which, head, side):
            start = which * self.d + head * self.d_head
            return parts[p][side][start : start + self.d_head]

        def total(p, which, head):
            both = zip(piece(p, which, head, 0), piece(p, which, head, 1), strict=True)
            return [a + c for a, c in both]

        z_r = [[[0.0] * self.d_head for _ in range(self.heads)] for _ in range(n)]
        z_i = [[[0.0] * self.d_head for _ in range(self.heads)] for _ in range(n)]
        for p in range(n):
            for h in range(self.heads):
                past = range(p + 1)
                a_rel = self.softmax_row(piece(p, 0, h, 0), [piece(k, 1, h, 0) for k in past])
                a_tot = self.softmax_row(total(p, 0, h), [total(k, 1, h) for k in past])
                for e in range(self.d_head):
                    z_r[p][h][e] = sum(a_rel[k] * piece(k, 2, h, 0)[e] for k in past)
                    z_i[p][h][e] = sum(a_tot[k] * total(k, 2, h)[e] for k in past) - z_r[p][h][e]
        return z_r, z_i

    def __call__(self, ids: list[int], sources, means: list, targets=()):
        n = len(ids)
        wte, wpe = self.w["transformer.wte.weight"], self.w["transformer.wpe.weight"]
        i = [[wte[t][k] + wpe[p][k] for k in range(self.d)] for p, t in enumerate(ids)]
        r = [[0.0] * self.d for _ in ids]
        found = {}
        for layer in range(self.layers):
            name = f"transformer.h.{layer}"
            z_r, z_i = self.attention(layer, r, i)
            chosen = {
                (p, head.index)
                for head, position in sources
                for p in range(n)
                if head.layer == layer and (position is None or p == position % n)
            }
            for p, h in chosen:
                for e in range(self.d_head):
                    mean = means[layer][p][h][e]
                    z_r[p][h][e], z_i[p][h][e] = z_r[p][h][e] + z_i[p][h][e] - mean, mean
            for t, (head, position) in enumerate(targets):
                if head.layer == layer:
                    found[t] = z_r[position % n][head.index], z_i[position % n][head.index]
            for p in range(n):
                flat = [[e for head in z[p] for e in head] for z in (z_r, z_i)]
                add_r, add_i = self.lin(*flat, f"{name}.attn.c_proj")
                r[p] = [a + b for a, b in zip(r[p], add_r, strict=True)]
                i[p] = [a + b for a, b in zip(i[p], add_i, strict=True)]
                hidden = self.lin(*self.ln(r[p], i[p], f"{name}.ln_2"), f"{name}.mlp.c_fc")
                hidden = self.act(*self.cancel(*hidden))
                add_r, add_i = self.cancel(*self.lin(*hidden, f"{name}.mlp.c_proj"))
                r[p], i[p] = self.cancel(
                    [a + b for a, b in zip(r[p], add_r, strict=True)],
                    [a + b for a, b in zip(i[p], add_i, strict=True)],
                )
        last = self.ln(r[-1], i[-1], "transformer.ln_f")
        logits = [
            [sum(a * w for a, w in zip(part, row, strict=True)) for row in self.w["lm_head.weight"]]
            for part in last
        ]
        return logits, [[found[t][side] for t in range(len(targets))] for side in (0, 1)]


# -- the rules -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", SETS)
def test_rules_number_by_number(model, tokens, which):
    means = means_of(model)
    found = published(model, tokens, [SETS[which]], means, targets=TARGETS)
    oracle = Oracle(model)
    for row, ids in enumerate(tokens.tolist()):
        logits, z = oracle(ids, SETS[which], means.tolist(), TARGETS)
        for part, expected in (
            (found.relevant, logits[0]),
            (found.irrelevant, logits[1]),
            (found.target_relevant, z[0]),
            (found.target_irrelevant, z[1]),
        ):
            torch.testing.assert_close(
                part[0, row], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )
    assert found.relevant.abs().max() > 0.1 or which == "nothing"


def test_single_rules_on_numbers_worked_out_by_hand():
    def pair(r, i):
        return pairs.Pair(torch.tensor(r).double(), torch.tensor(i).double())

    shared = pairs.share(
        pair([3.0, 0.0, 0.0], [-1.0, 2.0, 0.0]), torch.tensor([8.0, 1, 1]).double()
    )
    torch.testing.assert_close(
        shared.relevant, torch.tensor([6.0, 0, 0]).double(), atol=1e-7, rtol=0
    )
    # A bias loses TOL/(|u| + |v| + TOL) of itself, and all of itself where both parts are 0.
    assert 1 - shared.irrelevant[1] == pytest.approx(TOL / 2, rel=1e-6)
    assert shared.total[2] == 0
    cancelled = pairs.cancel(pair([3.0, -1.0, 2.0, 2.0, 0.0], [-1.0, 4.0, -2.0, 1.0, -5.0]))
    assert cancelled.relevant.tolist() == [2, 0, 0, 2, 0]
    assert cancelled.irrelevant.tolist() == [0, 3, 0, 1, -5]
    activated = pairs.activate(pair([2.0, -2.0], [-1.0, 1.0]), torch.relu)
    assert activated.relevant.tolist() == [1, -1]
    assert activated.irrelevant.tolist() == [0, 1]


@pytest.mark.parametrize("which", SETS)
def test_parts_add_up_to_the_logits_but_for_tol(monkeypatch, which):
    # 3 layers of width 32: more biases for TOL to take from than in the smallest model.
    model = cl.load(tiny("gpt2"))
    tokens = torch.randint(97, (4, 9), generator=torch.Generator().manual_seed(3))
    means = means_of(model, 9)
    with torch.no_grad():
        logits = model.hf(tokens).logits[:, -1]

    def deviation(tol: float) -> float:
        monkeypatch.setattr(pairs, "TOL", tol)
        found = published(model, tokens, [SETS[which]], means)
        return float((found.relevant + found.irrelevant - logits)[0].abs().max())

    assert deviation(0) < 1e-12
    assert 1e-9 < deviation(TOL) < 1e-5
    # What is missing is in proportion to TOL, so TOL is all that is missing.
    assert deviation(TOL) == pytest.approx(deviation(TOL / 10) * 10, rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"n_inner": 11, "layer_norm_epsilon": 0.1},
        {"tie_word_embeddings": False},
        {"reorder_and_upcast_attn": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_configurations_of_gpt2(tokens, options):
    model = small(**options)
    with torch.no_grad():
        logits = model.hf(tokens).logits[:, -1]
    found = published(model, tokens, [SETS["two layers"]], means_of(model))
    torch.testing.assert_close((found.relevant + found.irrelevant)[0], logits, rtol=0, atol=1e-5)
    if options == {"activation_function": "relu"}:
        expected, _ = Oracle(model, f=lambda x: max(x, 0.0))(
            tokens[1].tolist(), SETS["two layers"], means_of(model).tolist()
        )
        torch.testing.assert_close(found.relevant[0, 1].tolist(), expected[0], rtol=0, atol=1e-12)


def test_without_a_deviation_nothing_is_relevant(model, tokens):
    sites = [(cl.Head(1, 0), p) for p in range(N_POS)]
    clean = published(model, tokens[:1], [[]], means_of(model), targets=sites)
    means = means_of(model)
    means[1, :, 0] = clean.target_irrelevant[0, 0]
    found = published(model, tokens[:1], [[(cl.Head(1, 0), None)]], means)
    assert not found.relevant.any()
    torch.testing.assert_close(found.irrelevant, clean.irrelevant, rtol=0, atol=0)


# -- sources, targets, chunks ----------------------------------------------------------------


def close(found, expected, tolerance: float = 1e-12) -> None:
    for name in ("relevant", "irrelevant", "target_relevant", "target_irrelevant"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance
        )


def test_all_positions_are_every_single_one(model, tokens):
    means, head = means_of(model), cl.Head(0, 1)
    whole = published(model, tokens, [[(head, None)]], means, targets=TARGETS)
    listed = [(head, p) for p in (0, 1, 2, -2, -1)]
    close(published(model, tokens, [listed], means, targets=TARGETS), whole, 0)
    one = published(model, tokens, [listed[2:3]], means, targets=TARGETS)
    assert (one.relevant - whole.relevant).abs().max() > 0.1


def test_a_mean_counts_at_its_own_position_only(model, tokens):
    means = means_of(model)
    other = means.clone()
    other[0, :2], other[0, 3:], other[1], other[0, 2, 0] = 9, 9, 9, 9
    sets = [[(cl.Head(0, 1), 2)]]
    close(published(model, tokens, sets, other), published(model, tokens, sets, means), 0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 64])
def test_sets_together_and_in_chunks_equal_one_prompt_and_set_at_a_time(model, tokens, batch_size):
    means, sets = means_of(model), list(SETS.values())
    found = published(model, tokens, sets, means, targets=TARGETS, batch_size=batch_size)
    assert found.relevant.shape == found.irrelevant.shape == (len(sets), 3, 13)
    assert found.target_relevant.shape == (len(sets), 3, len(TARGETS), 4)
    for s, sites in enumerate(sets):
        for row in range(3):
            alone = published(model, tokens[row : row + 1], [sites], means, targets=TARGETS)
            mine = (slice(s, s + 1), slice(row, row + 1))
            close(
                type(found)(
                    found.relevant[mine],
                    found.total[mine],
                    found.target_relevant[mine],
                    found.target_total[mine],
                ),
                alone,
            )


def test_layers_below_the_sources_are_computed_once(model, tokens, monkeypatch):
    rows: dict[int, list[int]] = {0: [], 1: []}
    original = cl.cdt.gpt2.PairedGPT2._finish

    def count(self, layer, x, z):
        rows[layer].append(len(x.relevant))
        return original(self, layer, x, z)

    monkeypatch.setattr(cl.cdt.gpt2.PairedGPT2, "_finish", count)
    high, low = [(cl.Head(1, 0), None)], [(cl.Head(0, 0), None)]
    published(model, tokens, [high, low, high, [], high], means_of(model), batch_size=3)
    assert rows[0] == [3, 3]  # for `low`, then once for all others
    assert rows[1] == [3, 3, 3, 3, 3]


def test_targets_are_recorded_after_sources_are_set(model, tokens):
    means = means_of(model)
    source, above, below = cl.Head(1, 1), cl.Head(1, 0), cl.Head(0, 0)
    targets = [(source, 2), (above, 2), (below, -1), (source, 3)]
    clean = published(model, tokens, [[]], means, targets=targets)
    found = published(model, tokens, [[(source, 2)]], means, targets=targets)
    assert not clean.target_relevant.any()
    # At the source: mean and deviation. Beside and below it: nothing is relevant.
    torch.testing.assert_close(found.target_irrelevant[0, :, 0], means[1, 2, 1].expand(3, -1))
    torch.testing.assert_close(
        found.target_relevant[0, :, 0], clean.target_irrelevant[0, :, 0] - means[1, 2, 1]
    )
    assert not found.target_relevant[0, :, 1:].any()
    torch.testing.assert_close(found.target_irrelevant[:, :, 1:], clean.target_irrelevant[:, :, 1:])
    # z is what the hooked view calls z.
    batch = model.unlabelled(tokens)
    seen: list[Tensor] = []
    with torch.no_grad():
        model.logits(batch, {model.z_hook(1): seen.append})
    z = seen[0].unflatten(-1, (2, 4)) if seen[0].ndim == 3 else seen[0]
    torch.testing.assert_close(clean.target_irrelevant[0, :, 0], z[:, 2, 1], rtol=1e-6, atol=1e-6)


def test_without_targets_or_sources_those_axes_are_empty(model, tokens):
    found = published(model, tokens, [SETS["one position"]], means_of(model))
    assert found.target_relevant.shape == found.target_irrelevant.shape == (1, 3, 0, 4)
    assert published(model, tokens, [], means_of(model)).relevant.shape == (0, 3, 13)
    assert not found.relevant.requires_grad


# -- types -----------------------------------------------------------------------------------


def test_float32(tokens):
    sets, exact = list(SETS.values()), small()
    expected = published(exact, tokens, sets, means_of(exact), targets=TARGETS)
    found = published(small(torch.float32), tokens, sets, means_of(exact), targets=TARGETS)
    assert found.relevant.dtype == found.target_relevant.dtype == torch.float32
    scale = float(expected.irrelevant.abs().max())
    assert (found.relevant - expected.relevant).abs().max() < 1e-4 * scale
    assert (found.target_relevant - expected.target_relevant).abs().max() < 1e-4 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_decomposed_in_float32(tokens, dtype):
    model = small(dtype)
    means, sets = means_of(model), list(SETS.values())
    found = published(model, tokens.int(), sets, means, targets=TARGETS)
    assert found.relevant.dtype == torch.float32
    whole = cl.load(AutoModelForCausalLM.from_config(model.hf.config).float())
    whole.hf.load_state_dict(model.hf.state_dict())
    close(found, published(whole, tokens, sets, means, targets=TARGETS), 0)


# -- errors ----------------------------------------------------------------------------------


SOURCE = [[(cl.Head(0, 0), 0)]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": "magic"}, "rules='magic' is unknown: choose one of cdt, .*, hsu2024"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sources": [[(cl.Head(2, 0), 0)]]}, "no head a2.h0: it has 2 layers of 2 heads"),
        ({"sources": [[(cl.Head(0, -1), 0)]]}, "no head a0.h-1"),
        ({"sources": [[(cl.Head(0, 0), 0), (cl.Head(0, 1), 5)]]}, "source a0.h1 is at position 5"),
        ({"sources": [[(cl.Head(0, 0), -6)]]}, "position -6, but the prompts have 5 tokens"),
        ({"sources": [[(cl.Head(0, 0), 1.5)]]}, "an integer or None for all .* but is 1.5"),
        ({"sources": [(cl.Head(0, 0), 0)]}, "a0.h0 is not a source: give .head, position. pairs"),
        ({"sources": [cl.Head(0, 0)]}, "a0.h0 is not a source"),
        ({"sources": [[("a0.h0", 0)]]}, "is not a source"),
        ({"sources": [[(cl.Head(0, 0), 0, 0)]]}, "is not a source"),
        ({"targets": [(cl.Head(0, 2), 0)]}, "no head a0.h2"),
        ({"targets": [(cl.Head(0, 1), 5)]}, "target a0.h1 is at position 5"),
        ({"targets": [(cl.Head(0, 1), None)]}, "target a0.h1 must be an integer, but is None"),
        ({"targets": [cl.Head(0, 1)]}, "a0.h1 is not a target"),
        ({"means": torch.zeros(2, 2, 4)}, r"\(2, 5, 2, 4\) .* but it is \(2, 2, 4\)"),
        ({"means": torch.zeros(2, 4, 2, 4)}, r"but it is \(2, 4, 2, 4\)"),
        ({"means": torch.zeros(2, 5, 2, 8)}, r"but it is \(2, 5, 2, 8\)"),
        ({"tokens": torch.zeros(5, dtype=torch.long)}, r"torch.int64 of shape \(5,\)"),
        ({"tokens": torch.zeros(0, 5, dtype=torch.long)}, r"of shape \(0, 5\)"),
        ({"tokens": torch.zeros(1, 5)}, "torch.float32 of shape"),
        ({"tokens": torch.zeros(1, 8, dtype=torch.long)}, "has positions for 7"),
        ({"tokens": torch.full((1, 5), 13)}, "13 tokens, and 13 is not one"),
        ({"tokens": torch.full((1, 5), -1)}, "13 tokens, and -1 is not one"),
    ],
)
def test_arguments_that_cannot_be_used(model, tokens, change, message):
    arguments = {"tokens": tokens, "sources": SOURCE, "means": means_of(model), "rules": "hsu2024"}
    # The type checks of the tests would be first to complain; users do not have them.
    decompose = inspect.unwrap(cl.decompose)
    with pytest.raises(cl.InputError, match=message):
        decompose(model, **arguments | change)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "opt"])
def test_other_models_are_refused(name):
    model = cl.load(tiny(name))
    kind = type(model.hf).__name__
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(cl.UnsupportedModelError, match=f"{kind} .* needs a GPT2LM") as refused:
        published(model, tokens, SOURCE, means_of(model))
    # The remedy works, and is what happens by default.
    assert "choose rules='cdt' (in cl.relevance method='cdt')" in str(refused.value)
    remedy = cl.decompose(model, tokens, SOURCE, means_of(model), "cdt")
    default = cl.decompose(model, tokens, SOURCE, means_of(model))
    assert torch.equal(default.relevant, remedy.relevant)


def test_a_subclass_and_adapted_layers_are_refused(tokens):
    class Other(hf.GPT2LMHeadModel):
        pass

    model = small()
    means = means_of(model)
    other = cl.HookedModel(Other(model.hf.config))
    with pytest.raises(cl.UnsupportedModelError, match="Other cannot be decomposed"):
        published(other, tokens, SOURCE, means)

    class Adapted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias = layer.weight, layer.bias

    block = model.hf.transformer.h[1]
    block.attn.c_attn = Adapted(block.attn.c_attn)
    with pytest.raises(cl.UnsupportedModelError, match=r"h.1.attn.c_attn .* is a Adapted"):
        published(model, tokens, SOURCE, means)
