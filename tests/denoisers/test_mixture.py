"""Mixtures of denoisers: who is asked, about which images, and what is made of the answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from truth import random_images

import pyflocality as pf
from pyflocality.backends import trace_blocks

SHAPE = (2, 5, 5)
# Three images at two levels of the table below, in turn.
SIGMA, ALPHA = torch.tensor([0.1, 1.2, 0.12]).double(), torch.tensor([0.9, 0.8, 0.95]).double()
TABLE = [(0.1, (0.25, 0.75, 0.0)), (1.0, (0.5, 0.0, 0.5))]


class Refusing(pf.Denoiser):
    """A denoiser that must not be asked."""

    device = torch.device("cpu")

    def _denoise(self, x, levels):
        raise AssertionError("it has no share")


@pytest.fixture(scope="module")
def data() -> pf.TrainingSet:
    return pf.TrainingSet(random_images(torch.Generator().manual_seed(1), 120, SHAPE, torch.uint8))


@pytest.fixture(scope="module")
def models(data) -> list[pf.Denoiser]:
    return [pf.LocalDenoiser(data, 3), pf.OptimalDenoiser(data), pf.WienerDenoiser(data)]


def noisy(data: pf.TrainingSet, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    column = (slice(None), None, None, None)
    return (ALPHA[column] * data.values(5, 8).double() + SIGMA[column] * noise).to(dtype)


def directions(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, *SHAPE, generator=torch.Generator().manual_seed(3)).double()


def expected(of) -> torch.Tensor:
    """The formula, image by image, of all denoisers that the table has for it."""
    rows = []
    for b, weights in enumerate((TABLE[0][1], TABLE[1][1], TABLE[0][1])):
        rows.append(sum(w * of(m)[..., b, :, :, :] for m, w in enumerate(weights)))
    return torch.stack(rows, -4)


def test_answers_and_derivatives_are_mixtures(data, models):
    mixture, x, u = pf.MixtureDenoiser(models, TABLE), noisy(data), directions()
    level = SIGMA, ALPHA
    exact = {"rtol": 0, "atol": 1e-12}
    means = expected(lambda m: models[m](x, *level))
    torch.testing.assert_close(mixture(x, *level), means, **exact)
    found, products = mixture.jvp(x, u, *level)
    torch.testing.assert_close(found, means, **exact)
    truth = expected(lambda m: models[m].jvp(x, u, *level)[1])
    torch.testing.assert_close(products, truth, **exact)
    truth = expected(lambda m: models[m].vjp(x, u, *level))
    torch.testing.assert_close(mixture.vjp(x, u, *level), truth, **exact)
    # Single precision is as good as the models are in it.
    single = mixture(x.float(), *level)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), means, rtol=0, atol=2e-6)


def test_who_has_all_of_an_image_answers_to_the_bit(data, models):
    models = [*models[:2], Refusing(SHAPE)]
    chosen = pf.MixtureDenoiser(models, [(0.1, (1, 0, 0)), (1.0, (0, 1, 0))])
    for dtype in (torch.float16, torch.float32, torch.float64):
        x, u = noisy(data, dtype), directions().to(dtype)
        found, products = chosen.jvp(x, u, SIGMA, ALPHA)
        back = chosen.vjp(x, u, SIGMA, ALPHA)
        for b, model in enumerate((models[0], models[1], models[0])):
            rows = slice(b, b + 1)
            level = SIGMA[rows], ALPHA[rows]
            assert torch.equal(chosen(x, SIGMA, ALPHA)[rows], model(x[rows], *level))
            means, along = model.jvp(x[rows], u[:, rows], *level)
            assert torch.equal(found[rows], means) and torch.equal(products[:, rows], along)
            assert torch.equal(back[:, rows], model.vjp(x[rows], u[:, rows], *level))


def test_an_image_has_the_same_bits_in_every_batch(data, models):
    mixture = pf.MixtureDenoiser(models[:2], [(0.1, (0.3, 0.7)), (1.0, (0.0, 1.0))])
    x = noisy(data, torch.float32)
    together = mixture(x, SIGMA, ALPHA)
    for b in range(3):
        alone = mixture(x[b : b + 1], float(SIGMA[b]), float(ALPHA[b]))
        assert torch.equal(together[b : b + 1], alone)


def test_the_set_is_read_by_those_who_have_a_share(data, models):
    """Once by each of them, whatever the levels; the Wiener filter does not read it."""
    mixture, x = pf.MixtureDenoiser(models, TABLE), noisy(data)

    def passes(*given) -> float:
        with pf.use_backend("reference"), trace_blocks() as blocks:
            mixture(*given)
        return sum(block.count for block in blocks) / len(data)

    assert passes(x, SIGMA, ALPHA) == 2
    assert passes(x[1:2], SIGMA[1:2], ALPHA[1:2]) == 1
    assert passes(x[::2], SIGMA[::2], ALPHA[::2]) == 2


def test_linear_images_are_made_once_for_all_denoisers(data):
    basis = pf.Basis.from_data(data)
    models = [
        pf.LocallyLinearDenoiser(pf.LocalDenoiser(data, 3), 0.3, moments=basis),
        pf.LocallyLinearDenoiser(pf.LocalDenoiser(data, 5), 0.5, moments=basis),
    ]
    mixture, x = pf.MixtureDenoiser(models, (0.5, 0.5)), noisy(data)

    def reads(*given) -> int:
        with pf.use_backend("reference"), trace_blocks() as blocks:
            mixture(*given)
        return sum(block.count for block in blocks)

    first, again = reads(x, 0.3, 0.9), reads(x, 0.3, 0.9)
    assert first - again == len(data)
    # Levels of one ratio share them.
    assert reads(x, 0.6, 1.8) == again


@pytest.mark.parametrize(
    "weights",
    [
        (0.25, 0.75),
        [1 / 4, 3 / 4],
        torch.tensor([0.25, 0.75]),
        lambda alpha, sigma: (0.25, 0.75) if sigma < alpha else (1.0, 0.0),
        [(0.3, torch.tensor([0.25, 0.75])), (5.0, (1, 0))],
        ((0.3, (0.25, 0.75)), (5.0, (1, 0))),
    ],
)
def test_forms_of_weights(weights, data, models):
    mixture = pf.MixtureDenoiser(models[:2], weights)
    assert mixture.weights_at(0.3, 0.9) == (0.25, 0.75)
    x = noisy(data)
    truth = 0.25 * models[0](x, 0.3, 0.9) + 0.75 * models[1](x, 0.3, 0.9)
    torch.testing.assert_close(mixture(x, 0.3, 0.9), truth, rtol=0, atol=1e-12)


def test_weights_of_few_digits_are_made_to_sum_to_1(data, models):
    third = pf.MixtureDenoiser(models, (0.333333, 0.333333, 0.333333)).weights_at(1.0)
    assert third == pytest.approx((1 / 3,) * 3, rel=1e-12)
    # A level between two of a table takes the nearest in the logarithm, one outside the last.
    table = pf.MixtureDenoiser(models[:2], [(0.1, (1, 0)), (1.0, (0.5, 0.5))])
    taken = [table.weights_at(ratio)[0] for ratio in (0.0, 1e-9, 0.31, 0.32, 50.0)]
    assert taken == [1.0, 1.0, 1.0, 0.5, 0.5]
    assert table.weights_at(0.25, 0.5)[0] == 0.5


class Scale(nn.Module):
    """A network of one parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.factor * x


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.reset()


def test_a_compiled_graph_breaks_at_a_network_or_says_so(data, models, compiler):
    network = pf.NetworkDenoiser(Scale(), takes="nothing", image_shape=SHAPE)
    mixture = pf.MixtureDenoiser([network, models[1]], [(0.1, (0.5, 0.5)), (1.0, (1.0, 0.0))])
    x = noisy(data, torch.float32).requires_grad_()
    compiled = torch.compile(mixture, backend="eager")
    answer, expected = compiled(x, SIGMA, ALPHA), mixture(x, SIGMA, ALPHA)
    assert torch.equal(answer, expected)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (answer, expected)))
    # What was compiled is not taken again.
    compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(mixture, backend="eager", fullgraph=True)(x, SIGMA, ALPHA)
    # Without one it is a single operator.
    whole = pf.MixtureDenoiser(models[:2], (0.5, 0.5))
    found = torch.compile(whole, backend="eager", fullgraph=True)(x, SIGMA, ALPHA)
    assert torch.equal(found, whole(x, SIGMA, ALPHA))


def test_parameters_of_a_network_get_their_share(data, models):
    network = pf.NetworkDenoiser(Scale(), takes="nothing", image_shape=SHAPE)
    mixture = pf.MixtureDenoiser([network, models[1]], (0.25, 0.75))
    x = noisy(data, torch.float32).requires_grad_()
    answer = mixture(x, 0.3)
    torch.testing.assert_close(answer, 0.125 * x + 0.75 * models[1](x, 0.3), rtol=0, atol=1e-6)
    cotangent = directions(1)[0].float()
    (answer * cotangent).sum().backward()
    torch.testing.assert_close(network.module.factor.grad, 0.25 * (x * cotangent).sum().detach())
    truth = 0.125 * cotangent + 0.75 * models[1].vjp(x.detach(), cotangent[None], 0.3)[0]
    torch.testing.assert_close(x.grad, truth, rtol=0, atol=1e-6)
    products = mixture.vjp(x.detach(), cotangent[None], 0.3)[0]
    torch.testing.assert_close(products, truth, rtol=0, atol=1e-6)


def test_a_symmetric_jacobian_is_known_where_all_are(data, models):
    assert pf.MixtureDenoiser(models[1:2], [1.0]).symmetric_jacobian
    assert not pf.MixtureDenoiser(models[:2], [0.5, 0.5]).symmetric_jacobian


def test_what_cannot_be_mixed(data, models):
    other = pf.OptimalDenoiser(pf.TrainingSet(data.images[:, :, :3]))
    for denoisers, error, message in (
        (models[0], TypeError, "`denoisers` must be a sequence of denoisers"),
        ([], ValueError, "`denoisers` must hold at least one denoiser"),
        ([models[0], len], TypeError, "`denoisers` must hold denoisers, got <built-in"),
        ([models[0], other], ValueError, r"one shape, got \(2, 5, 5\) and \(2, 3, 5\)"),
    ):
        with pytest.raises(error, match=message):
            pf.MixtureDenoiser(denoisers, (0.5, 0.5))
    for weights, error, message in (
        ((0.5, 0.6), ValueError, "`weights` must sum to 1, got"),
        ((1.5, -0.5), ValueError, r"`weights` must be in \[0, 1"),
        ((1.0,), ValueError, "`weights` must be 2 numbers, one for each denoiser"),
        ((float("nan"), 1.0), ValueError, "`weights` must be in"),
        (torch.tensor([[0.5, 0.5]]), ValueError, "`weights` must be 2 numbers"),
        (torch.tensor([1, 0]), TypeError, "`weights` must have a floating-point dtype"),
        (0.5, TypeError, "`weights` must be one value, a function"),
        ([], ValueError, "`weights` must be a table of at least one pair"),
        ([(0.1, (0.5, 0.6))], ValueError, "`weights` must sum to 1"),
        ([(-1.0, (0.5, 0.5))], ValueError, "`weights` must hold positive noise levels"),
    ):
        with pytest.raises(error, match=message):
            pf.MixtureDenoiser(models[:2], weights)
    late = pf.MixtureDenoiser([models[0], Refusing(SHAPE)], lambda alpha, sigma: (0.5, 0.6))
    with pytest.raises(ValueError, match="`weights` must sum to 1"):
        late(noisy(data), 0.3)
