"""Every operation against a hand-written hook on the raw transformers model, and what is refused."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

import headwater as hw
from headwater.core.errors import InterventionError, SiteError
from headwater.core.model import Model
from tests.core.families import build

IDS = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(5))
OTHER = torch.randint(3, 61, (3, 7), generator=torch.Generator().manual_seed(6))
D = 32
TOLERANCE = 1e-9
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(build("llama"))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def hooked(model: Model, where: str, change: Change, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits with a bare hook. where: "layer.N" output, or "o_proj.N" input as [B, T, H, K]."""
    name, number = where.split(".")
    layer = model.hf.model.layers[int(number)]

    def after(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = change(x.clone())
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def before(module: Any, args: Any) -> Any:
        return (change(args[0].clone().unflatten(-1, (4, 8))).flatten(-2),)

    if name == "layer":
        handle = layer.register_forward_hook(after)
    elif name == "mlp":
        handle = layer.mlp.register_forward_hook(after)
    else:
        handle = layer.self_attn.o_proj.register_forward_pre_hook(before)
    try:
        return model.hf(ids).logits
    finally:
        handle.remove()


def assert_same(
    model: Model, changed: Any, where: str, change: Change, tolerance: float = TOLERANCE, **options: Any
) -> None:
    changed = list(changed) if isinstance(changed, list | tuple) else [changed]
    wanted = hooked(model, where, change)
    found = model.run(IDS, interventions=changed, **options).logits
    assert float((found - wanted).abs().max()) < tolerance
    plain = model.run(IDS).logits
    assert float((plain - wanted).abs().max()) > 1e-4, "the plain definition changes nothing"
    with model.intervene(*changed, **options):
        assert torch.equal(model.run(IDS).logits, found)
        assert float((model.hf(IDS).logits.detach() - wanted).abs().max()) < tolerance
    assert torch.equal(model.run(IDS).logits, plain)


def at(index: Any, edit: Change) -> Change:
    def change(x: torch.Tensor) -> torch.Tensor:
        x[index] = edit(x[index])
        return x

    return change


V = random(D)
ROWS = random(3, D, seed=1)
Q = torch.linalg.qr(ROWS.T)[0]  # an orthonormal basis of their span, in columns
UNIT = V / V.norm()


def clamp_along(x: torch.Tensor) -> torch.Tensor:
    along = x @ UNIT
    return x + (along.clamp(-0.05, 0.01) - along)[..., None] * UNIT


OPS: dict[str, tuple[Callable[..., hw.Intervention], Change]] = {
    "zero": (hw.zero, torch.zeros_like),
    "replace": (lambda s, **k: hw.replace(s, V, **k), lambda x: V.expand_as(x)),
    "add": (lambda s, **k: hw.add(s, V, scale=-2.5, **k), lambda x: x - 2.5 * V),
    "mean given": (lambda s, **k: hw.mean(s, V, **k), lambda x: V.expand_as(x)),
    "project_out one": (lambda s, **k: hw.project_out(s, V, **k), lambda x: x - (x @ UNIT)[..., None] * UNIT),
    "project_out span": (lambda s, **k: hw.project_out(s, ROWS, **k), lambda x: x - x @ Q @ Q.T),
    "swap_subspace": (lambda s, **k: hw.swap_subspace(s, V, ROWS, **k), lambda x: x + (V - x) @ Q @ Q.T),
    "clamp": (lambda s, **k: hw.clamp(s, low=-0.3, high=0.2, **k), lambda x: x.clamp(-0.3, 0.2)),
    "clamp below": (lambda s, **k: hw.clamp(s, low=0.0, **k), lambda x: x.clamp(min=0.0)),
    "clamp direction": (lambda s, **k: hw.clamp(s, low=-0.05, high=0.01, direction=3 * V, **k), clamp_along),
}
PLACES: dict[str, tuple[str, Any, Any]] = {
    "everywhere": ("", None, slice(None)),
    "index": ("@2", None, (slice(None), 2)),
    "negative": ("@-1", None, (slice(None), -1)),
    "slice": ("@1:4", None, (slice(None), slice(1, 4))),
    "from the end": ("@-3:", None, (slice(None), slice(-3, None))),
    "indices": ("@0,-2", None, (slice(None), [0, 5])),
    "list": ("", [1, 3], (slice(None), [1, 3])),
    "positions int": ("", -1, (slice(None), 6)),
    "positions slice": ("", slice(2, -1), (slice(None), slice(2, 6))),
    "positions name": ("", "S2", ([0, 1, 2], [4, 0, 6])),
    "named": ("@S2", None, ([0, 1, 2], [4, 0, 6])),
    "a tensor of one a prompt": ("", torch.tensor([4, 0, -1]), ([0, 1, 2], [4, 0, 6])),
}
NAMED = {"S2": torch.tensor([4, 0, -1])}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("op", OPS)
def test_every_operation_at_every_sort_of_position(model: Model, op: str, place: str) -> None:
    make, edit = OPS[op]
    suffix, positions, index = PLACES[place]
    changed = make(f"resid_post.1{suffix}", positions=positions)
    assert_same(model, changed, "layer.1", at(index, edit), positions=NAMED)


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
@pytest.mark.parametrize("positions", [None, [1, 0, -1]])
def test_directions_are_no_rows_of_prompts(model: Model, rank: int, positions: list[int] | None) -> None:
    """As many directions as prompts, in batches of several lengths: every prompt gets all of them."""
    prompts = [[3, 5, 7], [2, 4], [9, 8, 1]]
    directions, source = random(rank, D, seed=rank), random(3, D, seed=9)
    basis = torch.linalg.qr(directions.T)[0]
    if positions is None:
        swap = hw.swap_subspace("resid_post.1", V, directions)
    else:
        swap = hw.swap_subspace("resid_post.1", source, directions, positions=torch.tensor(positions))
    together = model.run(prompts, interventions=[swap], logits="last").logits
    for i, prompt in enumerate(prompts):
        row, where = (V, slice(None)) if positions is None else (source[i], positions[i])

        def edit(x: torch.Tensor, row: torch.Tensor = row) -> torch.Tensor:
            return x + (row - x) @ basis @ basis.T

        alone = hooked(model, "layer.1", at((slice(None), where), edit), torch.tensor([prompt]))[0, -1]
        assert float((together[i] - alone).abs().max()) < TOLERANCE


def test_heads(model: Model) -> None:
    every = slice(None)
    k = random(8, seed=2)
    assert_same(model, hw.zero("z.1.h2"), "o_proj.1", at((every, every, 2), torch.zeros_like))
    assert_same(model, hw.zero("head.1.h2"), "o_proj.1", at((every, every, 2), torch.zeros_like))
    assert_same(model, hw.zero("head.1.h2@-1"), "o_proj.1", at((every, -1, 2), torch.zeros_like))
    assert_same(model, hw.add("z.1.h2@3", k), "o_proj.1", at((every, 3, 2), lambda x: x + k))
    assert_same(
        model, hw.add("z.1.h2@S2", k), "o_proj.1", at(([0, 1, 2], [4, 0, 6], 2), lambda x: x + k), positions=NAMED
    )
    assert_same(model, hw.zero("z.1.h*"), "o_proj.1", torch.zeros_like)
    # A head's write is z through its slice of the output projection.
    weight = model.hf.model.layers[1].self_attn.o_proj.weight[:, 16:24]
    assert_same(model, hw.add("head.1.h2", weight @ k), "o_proj.1", at((every, every, 2), lambda x: x + k))
    # A pattern that sees the first key only gives each position the first value: of key/value head 1 for query head 2.
    first = torch.zeros(7, dtype=torch.float64).index_fill(0, torch.tensor(0), 1.0)
    v = model.run(IDS, capture="v.1")["v.1"]
    assert_same(
        model,
        hw.replace("pattern.1.h2", first),
        "o_proj.1",
        at((every, every, 2), lambda x: v[:, :1, 1].expand_as(x)),
        tolerance=1e-6,  # the library's plain attention takes its softmax in float32
    )


def test_values_of_a_run(model: Model) -> None:
    other = model.run(OTHER, capture=["resid_post.1", "z.1", "mlp_out.*"])
    held, z = other["resid_post.1"], other["z.1"]
    every = slice(None)
    assert_same(model, hw.resample("resid_post.1", other), "layer.1", lambda x: held)
    assert_same(model, hw.mean("resid_post.1", other), "layer.1", lambda x: held.mean(0).expand_as(x))
    assert_same(model, hw.mean("resid_post.1@-1", other), "layer.1", at((every, -1), lambda x: held[:, -1].mean(0)))
    assert_same(model, hw.resample("z.1.h3", other), "o_proj.1", at((every, every, 3), lambda x: z[:, :, 3]))
    for suffix, positions, index in PLACES.values():
        if index == every:
            continue
        part = held[index]
        for make, edit in (
            (lambda s, **k: hw.resample(s, other, **k), lambda x, part=part: part),
            (lambda s, **k: hw.swap_subspace(s, other, ROWS, **k), lambda x, part=part: x + (part - x) @ Q @ Q.T),
        ):
            changed = make(f"resid_post.1{suffix}", positions=positions)
            assert_same(model, changed, "layer.1", at(index, edit), positions=NAMED)
    assert_same(model, hw.freeze("resid_post.1", other), "layer.1", lambda x: held)
    part = held[:, [1, 3]]
    frozen = hw.freeze("resid_post.1", other, positions=[1, 3])
    assert_same(model, frozen, "layer.1", at((every, [1, 3]), lambda x: part))


def test_freeze_holds_every_site_of_a_pattern(model: Model) -> None:
    other = model.run(OTHER, capture=["mlp_out.*", "pattern.*"])
    frozen = hw.freeze("mlp_out.*", other)
    found = model.run(IDS, capture="mlp_out.*", interventions=[frozen])
    handles = [
        layer.mlp.register_forward_hook(lambda m, a, o, i=i: other[f"mlp_out.{i}"])
        for i, layer in enumerate(model.hf.model.layers)
    ]
    wanted = model.hf(IDS).logits.detach()
    for handle in handles:
        handle.remove()
    assert float((found.logits - wanted).abs().max()) < TOLERANCE
    assert all(torch.equal(found[f"mlp_out.{i}"], other[f"mlp_out.{i}"]) for i in range(3))
    # With patterns held at its own run, the output is its own; at another's, the pattern seen is the other's.
    own = model.run(IDS, capture="pattern.*")
    assert torch.equal(model.run(IDS, interventions=[hw.freeze("pattern.*", own)]).logits, own.logits)
    seen = model.run(IDS, capture="pattern.1", interventions=[hw.freeze("pattern.*", other)])
    assert torch.equal(seen["pattern.1"], other["pattern.1"])
    assert not torch.equal(seen.logits, own.logits)


def test_values_stay_with_their_prompts_when_lengths_differ(model: Model) -> None:
    prompts = [IDS[0].tolist(), IDS[1, :4].tolist(), IDS[2].tolist(), IDS[0, :4].tolist()]
    values = random(4, D, seed=4)
    together = model.run(prompts, logits="last", interventions=[hw.add("resid_post.1@-1", values)])
    for i, prompt in enumerate(prompts):
        one = model.run([prompt], logits="last", interventions=[hw.add("resid_post.1@-1", values[i])])
        assert float((together.logits[i] - one.logits[0]).abs().max()) < TOLERANCE
    # A run of several lengths lends each prompt its own values.
    source = model.run([p[::-1] for p in prompts], capture="resid_post.1")
    together = model.run(prompts, logits="last", interventions=[hw.resample("resid_post.1", source)])
    for i, prompt in enumerate(prompts):
        held = hw.replace("resid_post.1", source["resid_post.1"][i][None])
        one = model.run([prompt], logits="last", interventions=[held])
        assert float((together.logits[i] - one.logits[0]).abs().max()) < TOLERANCE


def test_order_and_several_at_once(model: Model) -> None:
    add, double = hw.add("resid_post.1", V), hw.zero("resid_post.1@2")
    assert_same(model, [add, double], "layer.1", lambda x: at((slice(None), 2), torch.zeros_like)(x + V))
    assert_same(model, [double, add], "layer.1", lambda x: at((slice(None), 2), torch.zeros_like)(x) + V)
    # A nested block comes after the one around it.
    run = model.run(IDS, interventions=[add, double])
    with model.intervene(add), model.intervene(double):
        assert torch.equal(model.run(IDS).logits, run.logits)
        assert float((model.hf(IDS).logits.detach() - run.logits).abs().max()) < TOLERANCE
    with model.intervene(add):
        assert torch.equal(model.run(IDS, interventions=[double]).logits, run.logits)


def test_captures_see_the_edits(model: Model) -> None:
    other = model.run(OTHER, capture=[s for s in model.sites("*.1") if s.kind != "scores"])
    for site in other.captured:
        seen = model.run(IDS, capture=site, interventions=[hw.replace(site, other[site])])
        assert float((seen[site] - other[site]).abs().max()) < TOLERANCE, site


def test_a_value_is_differentiable() -> None:
    """The gradient with respect to an added vector is the limit of differences; weights get none."""
    model = Model(build("gpt2"))  # Llama's norms compute in float32, too coarse for differences
    direction = random(D, seed=9)
    for site in ("resid_post.1@-2", "attn_out.1", "resid_mid.0", "mlp_out.0@S2"):
        vector = (0.1 * V).requires_grad_(True)
        run = model.run(IDS, grad=True, positions=NAMED, interventions=[hw.add(site, vector)])
        (gradient,) = torch.autograd.grad(run.logits[:, -1, 7].sum(), vector)
        step = 1e-6
        plus, minus = (
            model.run(
                IDS, positions=NAMED, interventions=[hw.add(site, vector.detach() + s * step * direction)]
            ).logits[:, -1, 7]
            for s in (1, -1)
        )
        wanted = float((plus - minus).sum()) / (2 * step)
        assert float(gradient @ direction) == pytest.approx(wanted, rel=1e-5)
        assert abs(wanted) > 1e-3
    assert all(p.grad is None for p in model.hf.parameters())
    # Directions too (a rotation that is learned).
    rows = ROWS.clone().requires_grad_(True)
    swap = hw.swap_subspace("resid_post.1", V, rows)
    model.run(IDS, grad=True, interventions=[swap]).logits[:, -1, 7].sum().backward()
    assert rows.grad is not None and float(rows.grad.abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: hw.add("resid_post.1", torch.zeros(31)), InterventionError, "does not fit.*31.*32"),
        (lambda: hw.replace("z.1.h2", torch.zeros(9)), InterventionError, "does not fit.*8"),
        (lambda: hw.project_out("resid_post.1", torch.zeros(2, 31)), InterventionError, "width 31.*width 32"),
        (lambda: hw.clamp("resid_post.1"), InterventionError, "bound"),
        (lambda: hw.clamp("resid_post.1", low=1.0, high=0.0), InterventionError, "low"),
        (lambda: hw.clamp("resid_post.1", low=0.0, direction=torch.zeros(31)), InterventionError, "31.*width 32"),
        (lambda: hw.zero("resid_pots.1"), SiteError, "resid_post"),
        (lambda: hw.zero("resid_post.3"), SiteError, "no layer 3.*0 to 2"),
        (lambda: hw.zero("z.1.h4"), SiteError, "h0 to h3"),
        (lambda: hw.zero("k.1.h2"), SiteError, "h0 to h1"),
        (lambda: hw.zero("cross_z.1"), SiteError, "no site cross_z.1"),
        (lambda: hw.zero("encoder/z.1"), SiteError, "no stack 'encoder'"),
        (lambda: hw.zero("resid_post.1@7"), InterventionError, "7 tokens"),
        (lambda: hw.zero("resid_post.1@-8"), InterventionError, "7 tokens"),
        (lambda: hw.zero("resid_post.1", positions=[0, 7]), InterventionError, "7 tokens"),
        (lambda: hw.zero("resid_post.1", positions=torch.tensor([0, 1, 7])), InterventionError, "outside"),
        (lambda: hw.zero("resid_post.1@S3"), SiteError, "unknown position.*S2"),
        (lambda: hw.zero("resid_post.1@9:12"), SiteError, "never fired"),
        (lambda: hw.zero("resid_post.1", positions="decode"), SiteError, "never fired"),
        (lambda: hw.zero("resid_post.1", positions=cast(Any, 1.5)), InterventionError, "cannot read the positions"),
        (lambda: hw.zero("resid_post.1", positions=slice(0, 6, 2)), InterventionError, "no step"),
        (lambda: hw.zero("resid_post.1@2", positions=3), InterventionError, "positions"),
    ],
)
def test_what_is_refused(model: Model, make: Callable[[], Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=f"(?s){says}"):
        model.run(IDS, interventions=[make()], positions=NAMED)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_what_a_run_does_not_hold_is_refused(model: Model) -> None:
    run = model.run(IDS, capture="resid_post.0")
    with pytest.raises(InterventionError, match=r"captured nothing.*capture=\['mlp_out.\*'\]"):
        hw.freeze("mlp_out.*", run)
    with pytest.raises(SiteError, match="was not captured"):
        hw.resample("resid_post.1", run)
    lengths = model.run([[5, 6, 7], [5, 6]], capture="resid_post.0")
    with pytest.raises(InterventionError, match="differ in length"):
        hw.mean("resid_post.0", lengths)
    with pytest.raises(InterventionError, match="Give one of them"):
        hw.resample("resid_post.0@1", run, positions=[2])
