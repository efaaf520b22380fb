"""The latent consistency loss: what depends on what, the target as a constant function, the draw, what is refused."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from robustdiff import DiffusionProcess, FreeAdversary, LatentConsistencyObjective, PGDAdversary
from robustdiff.objectives.latent_consistency import boundary_scalings, embed_guidance, solver_times

T = 100


class Network(nn.Module):
    """Small, smooth, and dependent on everything that it is called with; counts its calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.convolution = nn.Conv2d(2, 2, 3, padding=1).double()
        self.calls = 0

    def forward(self, x, t, encoder_hidden_states=None, timestep_cond=None, class_labels=None):
        self.calls += 1
        assert not t.is_floating_point()
        shift = t.double() / T
        for value in (encoder_hidden_states, timestep_cond, class_labels):
            if value is not None:
                shift = shift + value.double().reshape(len(x), -1).mean(1)
        return torch.tanh(self.convolution(x) + shift[:, None, None, None])


def tensors(n=4):
    generator = torch.Generator().manual_seed(1)
    x0, noise, delta = (torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    text = torch.randn(n, 3, 6, generator=generator, dtype=torch.float64)
    return x0, noise, 0.3 * delta, text, torch.rand(n, generator=generator, dtype=torch.float64) * 5


PROCESS = DiffusionProcess.linear(T)
INDEX = torch.tensor([0, 3, 5, 6])
EMPTY = torch.zeros(1, 3, 6, dtype=torch.float64)


def make(target=None, teacher=None, **settings):
    settings = {"solver_steps": 7, "guidance_embedding": 8, "metric": "l2", **settings}
    return LatentConsistencyObjective(target or Network(1), teacher or Network(2), PROCESS, **settings)


def column(values):
    return values[:, None, None, None]


# -- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("perturb", ["solver", "student"])
@pytest.mark.parametrize("metric", ["l2", "huber"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("width", [None, 9])
def test_the_loss_written_out(perturb, metric, prediction, width):
    student, target, teacher = Network(0), Network(1), Network(2)
    objective = make(
        target,
        teacher,
        perturb=perturb,
        metric=metric,
        prediction=prediction,
        guidance_embedding=width,
        huber_c=0.2,
        sigma_data=0.7,
        timestep_scaling=3.0,
    )
    x0, noise, delta, text, w = tensors()
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    draw = objective.draw(x0, t=INDEX, noise=noise, w=w, weight=weight, encoder_hidden_states=text, unconditional=EMPTY)
    losses = objective(student, draw, delta)

    gap = T // 7
    upper = (INDEX + 1) * gap - 1
    lower = (upper - gap).clamp(min=0)
    bars = torch.cumprod(1 - torch.linspace(10 * 0.0001, 10 * 0.02, T, dtype=torch.float64), 0)

    def estimates(x, t, output):
        alpha, sigma = column(bars[t].sqrt()), column((1 - bars[t]).sqrt())
        if prediction == "epsilon":
            return (x - sigma * output) / alpha, output
        if prediction == "sample":
            return output, (x - alpha * output) / sigma
        return alpha * x - sigma * output, sigma * x + alpha * output

    def function(network, x, t):
        condition = {"encoder_hidden_states": text}
        if width is not None:
            condition["timestep_cond"] = embed_guidance(w, width)
        x_0, _ = estimates(x, t, network(x, t, **condition))
        scaled = column(3.0 * t.double())
        return 0.49 / (scaled**2 + 0.49) * x + scaled / (scaled**2 + 0.49).sqrt() * x_0

    x = column(bars[upper].sqrt()) * x0 + column((1 - bars[upper]).sqrt()) * noise
    # Guidance of x̂_0 and of ε̂, each by itself.
    with_text = estimates(x, upper, teacher(x, upper, encoder_hidden_states=text))
    without = estimates(x, upper, teacher(x, upper, encoder_hidden_states=EMPTY.expand_as(text)))
    x_0, eps = (a + column(w) * (a - b) for a, b in zip(with_text, without, strict=True))
    solved = column(bars[lower].sqrt()) * x_0 + column((1 - bars[lower]).sqrt()) * eps
    torch.testing.assert_close(draw.solved, solved)
    torch.testing.assert_close(draw.x_t, solved if perturb == "solver" else x)
    assert torch.equal(draw.t, lower if perturb == "solver" else upper)
    if perturb == "solver":
        solved = solved + delta
    else:
        x = x + delta
    gap = function(student, x, upper) - function(target, solved, lower)
    error = gap**2 if metric == "l2" else (gap**2 + 0.04).sqrt() - 0.2
    torch.testing.assert_close(losses["distance"], error.mean((1, 2, 3)))
    torch.testing.assert_close(losses["loss"], weight * error.mean((1, 2, 3)))


@pytest.mark.parametrize("perturb", ["solver", "student"])
def test_gradients_of_delta_and_of_the_student(perturb):
    student = Network(0)
    objective = make(perturb=perturb)
    x0, noise, delta, text, w = tensors()
    draw = objective.draw(x0, t=INDEX, noise=noise, w=w, encoder_hidden_states=text, unconditional=EMPTY)

    def loss(delta, bias):
        with torch.no_grad():
            student.convolution.bias.copy_(bias)
        return objective(student, draw, delta)["loss"].sum()

    bias = student.convolution.bias.detach().clone()
    delta.requires_grad_(True)
    objective(student, draw, delta)["loss"].sum().backward()
    direction = torch.randn(delta.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = 1e-5
    with torch.no_grad():
        slope = (loss(delta + h * direction, bias) - loss(delta - h * direction, bias)) / (2 * h)
        torch.testing.assert_close((delta.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9)
        slope = (loss(delta, bias + h) - loss(delta, bias - h)) / (2 * h)
        torch.testing.assert_close(student.convolution.bias.grad.sum(), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("passes", [FreeAdversary(steps=3, step_size=0.1), PGDAdversary(steps=2, step_size=0.1)])
def test_the_teacher_is_called_in_the_draw_only(passes):
    teacher, student = Network(2), Network(0)
    objective = make(teacher=teacher)
    x0, _, _, text, _ = tensors()
    draw = objective.draw(x0, encoder_hidden_states=text, unconditional=EMPTY)
    assert teacher.calls == 2
    losses = lambda delta: objective(student, draw, delta)["loss"]  # noqa: E731
    for delta in passes(draw.x_t, draw.t, loss=losses):
        losses(delta).mean().backward()
    assert teacher.calls == 2
    assert delta.abs().max() > 0
    assert teacher.convolution.weight.grad is None


def test_the_last_point_is_the_identity():
    objective, x0 = make(), tensors()[0]
    draw = objective.draw(
        x0, t=torch.zeros(4, dtype=torch.long), encoder_hidden_states=tensors()[3], unconditional=EMPTY
    )
    assert torch.equal(objective._function(objective.target, x0, draw.lower, draw), x0)


# -- the target as the student itself ----------------------------------------------------------------------------


def student_of_lora(peft):
    torch.manual_seed(0)
    network = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
    ).requires_grad_(False)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    return network.train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_student_as_its_own_target_with_lora(checkpointing):
    peft = pytest.importorskip("peft")
    student = student_of_lora(peft)
    x0, noise, delta, text, w = (value.float() for value in tensors())
    settings = {"teacher": copy.deepcopy(student), "guidance_embedding": None, "guidance": (5.0, 15.0)}
    arguments = {"t": INDEX, "noise": noise, "w": w, "encoder_hidden_states": text, "unconditional": EMPTY.float()}
    gradients = []
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    if checkpointing:
        student.enable_gradient_checkpointing()
    for target in (student, copy.deepcopy(student).requires_grad_(False)):
        objective = make(target, **settings)
        draw = objective.draw(x0, **arguments)
        moved = delta.clone().requires_grad_(True)
        objective(student, draw, moved)["loss"].sum().backward()
        gradients.append([moved.grad, *(p.grad for p in student.parameters() if p.requires_grad)])
        assert {name for name, p in student.named_parameters() if p.requires_grad} == trained
        assert {name for name, p in student.named_parameters() if p.grad is not None} == trained
        assert student.is_gradient_checkpointing == checkpointing
        student.zero_grad(set_to_none=True)
    assert gradients[0][0].abs().max() > 0
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)


def test_an_update_leaves_the_student_as_its_own_target():
    student = Network(0)
    before = [p.clone() for p in student.parameters()]
    make(student).after_update(student)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_the_target_follows_the_student_by_the_decay():
    student, target = Network(0), Network(1)
    before = [p.clone() for p in target.parameters()]
    objective = make(target, decay=0.9)
    objective.after_update(student, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    objective.after_update(student)
    for a, b, c in zip(before, student.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(c, 0.9 * a + 0.1 * b)
    assert all(p.requires_grad for p in student.parameters())


# -- the draw ----------------------------------------------------------------------------------------------------


def test_a_draw_follows_its_generator():
    objective = make(guidance=(3.0, 4.0))
    x0, _, _, text, _ = tensors(64)
    one, two, other = (
        objective.draw(
            x0, generator=torch.Generator().manual_seed(seed), encoder_hidden_states=text, unconditional=EMPTY
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.solved, two.solved)
    assert not torch.equal(one.solved, other.solved)
    assert 3 <= one.w.min() < one.w.max() <= 4
    assert set(one.upper.tolist()) == set(solver_times(7, T).tolist())
    more = objective.more_noise(x0.shape, torch.Generator().manual_seed(0))
    assert more["w"].shape == (64,)
    torch.testing.assert_close(one.w_embedding, embed_guidance(one.w, 8).double())


def test_the_empty_condition_in_all_its_forms():
    class Teacher(nn.Module):
        def forward(self, x, t, encoder_hidden_states, class_labels, added_cond_kwargs):
            assert len(encoder_hidden_states) == len(class_labels) == len(added_cond_kwargs["text_embeds"]) == len(x)
            shift = encoder_hidden_states.sum((1, 2)) + class_labels.double() + added_cond_kwargs["text_embeds"].sum(1)
            return x * column(shift)

    x0, noise, _, text, w = tensors()
    pooled = text[:, 0]
    condition = {
        "encoder_hidden_states": text,
        "class_labels": torch.arange(4),
        "added_cond_kwargs": {"text_embeds": pooled},
    }
    objective = make(teacher=Teacher())
    draws = [
        objective.draw(x0, t=INDEX, noise=noise, w=w, **condition, unconditional=empty)
        for empty in (
            {"encoder_hidden_states": EMPTY, "class_labels": 9, "added_cond_kwargs": {"text_embeds": EMPTY[:, 0]}},
            {
                "encoder_hidden_states": EMPTY.expand_as(text),
                "class_labels": torch.full((4,), 9),
                "added_cond_kwargs": {"text_embeds": 0.0},
            },
        )
    ]
    assert torch.equal(draws[0].solved, draws[1].solved)
    # What the empty condition does not name is that of the condition.
    less = objective.draw(x0, t=INDEX, noise=noise, w=w, **condition, unconditional={"encoder_hidden_states": EMPTY})
    empty = {
        "encoder_hidden_states": EMPTY,
        "class_labels": condition["class_labels"],
        "added_cond_kwargs": {"text_embeds": pooled},
    }
    assert torch.equal(
        less.solved, objective.draw(x0, t=INDEX, noise=noise, w=w, **condition, unconditional=empty).solved
    )


def test_without_guidance_there_is_no_empty_condition():
    teacher = Network(2)
    objective = make(teacher=teacher, guidance=(0.0, 0.0))
    draw = objective.draw(tensors()[0])
    assert teacher.calls == 1
    assert torch.equal(draw.w, torch.zeros(4))
    assert objective.more_noise((4, 2, 5, 5), torch.Generator()) == {}
    with pytest.raises(ValueError, match="needs unconditional"):
        objective.draw(tensors()[0], w=torch.ones(4))


def test_half_precision_is_computed_in_float32():
    x0, noise, delta, text, w = tensors()
    reference = make().draw(x0, t=INDEX, noise=noise, w=w, encoder_hidden_states=text, unconditional=EMPTY)
    half = [value.bfloat16() for value in (x0, noise, text)]
    student, target, teacher = (copy.deepcopy(n).bfloat16() for n in (Network(0), Network(1), Network(2)))
    for network in (student, target, teacher):
        network.forward = lambda x, t, own=network, **_: own.convolution(x)
    objective = make(target, teacher)
    draw = objective.draw(
        half[0], t=INDEX, noise=half[1], w=w, encoder_hidden_states=half[2], unconditional=EMPTY.bfloat16()
    )
    assert draw.solved.dtype == draw.w_embedding.dtype == torch.bfloat16
    assert torch.equal(draw.upper, reference.upper)
    losses = objective(student, draw, delta.bfloat16())["loss"]
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()


def test_scalings_and_embedding():
    skip, out = boundary_scalings(torch.tensor([0.0, 19.0, 999.0], dtype=torch.float64))
    assert skip[0] == 1
    assert out[0] == 0
    assert float(skip[1]) == pytest.approx(0.25 / (190**2 + 0.25))
    assert float(out[2]) == pytest.approx(9990 / math.sqrt(9990**2 + 0.25))
    w = torch.tensor([0.0, 7.5], dtype=torch.float64)
    embedding = embed_guidance(w, 7)
    assert embedding.shape == (2, 7)
    for j in range(3):
        angle = 7500 * 10000 ** (-j / 2)
        assert float(embedding[1, j]) == pytest.approx(math.sin(angle), abs=1e-9)
        assert float(embedding[1, 3 + j]) == pytest.approx(math.cos(angle), abs=1e-9)
    assert torch.equal(embedding[:, 6], torch.zeros(2, dtype=torch.float64))


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "flow"}, "unknown prediction 'flow'"),
        ({"metric": "l1"}, "unknown metric 'l1'"),
        ({"perturb": "teacher"}, "unknown perturb"),
        ({"huber_c": 0.0}, "huber_c must be positive"),
        ({"sigma_data": -1.0}, "sigma_data must be positive"),
        ({"timestep_scaling": math.inf}, "timestep_scaling must be positive and finite"),
        ({"guidance": (5.0, 3.0)}, "guidance must be a range"),
        ({"guidance": (-1.0, 3.0)}, "guidance must be a range"),
        ({"guidance_embedding": 3}, "guidance_embedding must be at least 4"),
        ({"decay": 1.0}, "decay must be in"),
        ({"solver_steps": 0}, "solver_steps must be between 1 and the 100"),
        ({"solver_steps": 101}, "solver_steps must be between 1 and the 100"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_processes_that_do_not_suit():
    with pytest.raises(ValueError, match="α² \\+ σ² = 1"):
        LatentConsistencyObjective(Network(), Network(), DiffusionProcess.flow(T))
    alphas = torch.linspace(0.9, 0.0, T, dtype=torch.float64)
    ends_in_noise = DiffusionProcess(alphas, (1 - alphas**2).sqrt())
    with pytest.raises(ValueError, match="zero terminal SNR"):
        LatentConsistencyObjective(Network(), Network(), ends_in_noise)
    objective = LatentConsistencyObjective(Network(1), Network(2), ends_in_noise, prediction="v_prediction")
    x0, _, _, text, _ = tensors()
    draw = objective.draw(x0, t=torch.full((4,), 49), encoder_hidden_states=text, unconditional=EMPTY)
    assert objective(Network(0), draw)["loss"].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t": torch.tensor([0, 1, 2, 7])}, r"t must be in \[0, 7\); got 0 to 7"),
        ({"t": torch.tensor([-1, 1, 2, 3])}, r"t must be in \[0, 7\); got -1 to 3"),
        ({"t": torch.tensor([0.0, 1, 2, 3])}, "t must be whole numbers"),
        ({"t": torch.tensor([1])}, "with shape"),
        ({"w": torch.ones(3)}, "w must have shape"),
        ({"unconditional": None}, "needs unconditional"),
        ({"unconditional": {}}, "needs unconditional"),
        ({"unconditional": {"encoder_hidden_states": EMPTY, "class_labels": 3}}, "unconditional has class_labels"),
    ],
)
def test_draws_that_do_not_fit(arguments, message):
    x0, _, _, text, _ = tensors()
    with pytest.raises(ValueError, match=message):
        make().draw(x0, **{"encoder_hidden_states": text, "unconditional": EMPTY, **arguments})
