"""Loss terms that make the model smooth: SMART (two forms), Bregman proximal point, layer-wise noise stability (LNSR).

A model whose output changes a lot when its input barely moves has memorised its training data. Each term here is a
penalty on such a change. With x the embeddings of an example (the input of layer 1), f(x; theta) its logits and l_s
the task's divergence (symmetrised KL for classes, squared difference for values; tasks.py), the terms are

    AdversarialSmart   lambda * max over |delta|_inf <= radius of l_s(f(x + delta), f(x))      the worst small move
    GaussianSmart      lambda * mean over the outputs of (f(x + noise) - f(x))^2               a random small move
    Bregman            mu * l_s(f(x; theta), f(x; theta_t)), theta_t a slow average of theta   a move of the weights
    LNSR               lambda * mean over layers i, tokens, units of (h_i(x + noise) - h_i(x))^2

The maximum is approximated in one step: start at a small random delta_0, because at delta = 0 the divergence has no
slope; step along the gradient g; clip into the box: delta = clip(delta_0 + step * g / |g|_inf, -radius, radius).

With early exit f has one output per exit. A term is then the sum over the step's exits, each with its weight; LNSR
takes the layers up to the deepest of these exits.
Both passes use the same dropout masks. With different masks the penalty stays above zero even for a perfectly smooth
model. (Bregman's teacher has no dropout; see there.) Each term draws its noise from a generator of its own, so that it
changes no other random number. Noise on padding is 0.

Sources: Jiang et al. (2020), SMART; BERTer 3.2; SMARTer BERT 4.3; layer-level adaptations 3.1, 2.3; Hua et al. (2021).
"""

from contextlib import contextmanager
from dataclasses import replace

import torch

from base_bert import dropout_state
from errors import InputError
from methods import LossTerm, Method, among_tasks, at_least_zero, belongs, positive
from parallel import every_process
from tasks import widen

# The adversarial radius in multiples of the embeddings' RMS (root mean square), chosen by measurement. The step is 100
# times the radius, and the standard deviation of the start equals the radius: as in Jiang et al. (1e-3, 1e-5, 1e-5).
RADIUS, STEP_PER_RADIUS = 0.03, 100
# Standard deviation of the noise: GaussianSmart's in the units of the embeddings, LNSR's in multiples of their RMS.
GAUSSIAN_SIGMA, LNSR_SIGMA = 0.05, 0.05
# Decay of Bregman's teacher: EARLY_DECAY in the first tenth (EARLY) of a schedule, then LATE_DECAY.
EARLY, EARLY_DECAY, LATE_DECAY = 0.1, 0.99, 0.999


# --- parts that the terms use -------------------------------------------------------------------------------------


@contextmanager
def replay_dropout(rng, device):
    """Draw dropout masks from a saved generator state; restore the generator afterwards."""
    get_state, set_state = dropout_state(device)
    before = get_state()
    set_state(rng)
    try:
        yield
    finally:
        set_state(before)


def forward_again(model, batch, embeds, rng, exits):
    """Logits for other embeddings under the same dropout masks, outside autocast. Shapes: {exit: [b,o]}."""
    device = embeds[0].device
    with replay_dropout(rng, device), torch.autocast(device.type, enabled=False):
        return model(batch, embeds=embeds, exits=tuple(exits)).logits


def widen_outputs(model, batch, outputs, exits, mixed_precision):
    """The outputs of the loop's forward pass in float32 or wider.

    Under autocast the logits were rounded to a few digits, too few to show a small change. They are computed again.
    """
    embeds = tuple(widen(h) for h in outputs.embeds)
    logits = forward_again(model, batch, embeds, outputs.rng, exits) if mixed_precision else outputs.logits
    return replace(outputs, embeds=embeds, logits=logits)


def root_mean_square(hidden, masks):
    """RMS of the numbers of an example's real tokens, over all its encoder passes.

    There is one value per example, so that its noise does not depend on the other examples of the batch.
    Shapes: one [b,s,d] and one [b,s] per pass -> [b,1,1].
    """
    # the mask becomes [b,s,1] and sets padding to 0; then [b,s,d] is summed to [b]
    squares = [(h.detach().square() * mask.unsqueeze(-1)).sum((1, 2)) for h, mask in zip(hidden, masks, strict=True)]
    tokens = sum(mask.sum(-1) for mask in masks)  # [b]
    return (sum(squares) / (tokens * hidden[0].shape[-1])).sqrt()[:, None, None]  # [b] to [b,1,1]


def add(xs, ys):
    """Sums of two tuples of tensors."""
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


def weighted_divergence(task, logits, other, exit_weights):
    """l_s between two sets of logits, summed over the exits with their weights. Shapes: {exit: [b,o]} -> [b]."""
    return sum(w * task.objective.divergence(logits[i], other[i]) for i, w in exit_weights.items())


class SmoothnessTerm(LossTerm):
    """Base class: a penalty for the examples of some tasks.

    A subclass defines `penalty(model, batch, outputs, exit_weights) -> [b]`, the weight included.
    """

    def __init__(self, tasks, weight):
        self.tasks, self.weight = tuple(tasks), weight

    def __call__(self, model, batch, outputs, exit_weights):
        """The penalty of each example; zeros if the batch is of another task. Shapes: [b]."""
        if batch.task.name not in self.tasks:
            return torch.zeros(len(batch), device=batch.labels.device)
        return self.penalty(model, batch, outputs, exit_weights)


class NoiseTerm(SmoothnessTerm):
    """Base class of the terms that draw noise, from a generator of their own."""

    def __init__(self, tasks, generator, weight=1.0):
        super().__init__(tasks, weight)
        self.generator = generator

    def state_dict(self):
        """The state of the noise generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Continue drawing where the saved run stopped."""
        self.generator.set_state(state["generator"].cpu())

    def draw(self, hidden, masks, batch):
        """Standard normal noise, 0 on padding.

        If several processes share a batch, each draws the noise of all rows and keeps that of its own rows. So a row
        has the same noise with any number of processes.
        Shapes: hidden: one [b,s,d] per encoder pass; returns the same.
        """
        positions, rows = batch.place or (slice(None), len(hidden[0]))
        noise = []
        for h, mask in zip(hidden, masks, strict=True):
            device = self.generator.device  # CUDA if the model is there, otherwise the CPU
            x = torch.randn(rows, *h.shape[1:], dtype=h.dtype, generator=self.generator, device=device)
            noise.append(x[positions].to(h.device) * mask.unsqueeze(-1))  # [b,s,d] * [b,s,1]
        return tuple(noise)


# --- the terms ----------------------------------------------------------------------------------------------------


class AdversarialSmart(NoiseTerm):
    """SMART's smoothness-inducing adversarial regularisation: the divergence after the worst small move.

    The step is so long that about 80% of the coordinates end on the edge of the box. This is so with the published
    values too (step 1e-3, radius and start 1e-5, absolute), but a radius of 1e-5 is too small. With all-MiniLM-L6-v2 on
    dev sentences the penalty is about 2e-8, and adding it to the loss in float32 does not change the loss. In bf16 a
    perturbation this small changes 2% of the numbers, so the measured divergence is rounding error: hundreds of times
    the true penalty, or exactly 0. So the radius here is relative and the passes run in float32. The published values
    are about --smart_radius 2e-5.
    A training step costs 8 units instead of 3, if a forward pass costs 1, a full backward pass 2 and a backward pass to
    the embeddings 1. This holds for float32 training, where the loop's pass is reused as the clean pass.
    Each batch waits for the device once, to check that the perturbation changed something.

    Units: radius is a multiple of the RMS of the embeddings of an example's real tokens.
    Raises: InputError if the perturbation vanished: the ascent did not move it, adding it to the embeddings did not
        change them in their precision, or no output of the batch changed.
    Source: Jiang et al. (2020), section 3.1, algorithm 1 (K = 1); BERTer 3.2.
    Differs: the gradient is normalised per example over all its tokens and encoder passes (the authors' code:
        per token); the start is clipped into the box too.
    """

    def __init__(self, tasks, generator, weight=1.0, radius=RADIUS, mixed_precision=False):
        super().__init__(tasks, generator, weight)
        self.radius, self.mixed_precision = radius, mixed_precision

    def perturb(self, model, batch, outputs, exit_weights):
        """The random start and the perturbation after the ascent step. Shapes: tuples of one [b,s,d] per pass."""
        masks = model.masks(batch)
        scale = root_mean_square(outputs.embeds, masks)  # [b,1,1]
        radius = self.radius * scale
        # the radius is also the standard deviation: a third of the coordinates are clipped to the edge
        start = tuple((radius * x).clamp(-radius, radius) for x in self.draw(outputs.embeds, masks, batch))
        # all but delta is detached: the ascent needs the gradient of delta alone
        delta = tuple(x.clone().requires_grad_() for x in start)
        noisy = forward_again(model, batch, add([h.detach() for h in outputs.embeds], delta), outputs.rng, exit_weights)
        clean = {i: outputs.logits[i].detach() for i in exit_weights}
        divergence = weighted_divergence(batch.task, noisy, clean, exit_weights)  # [b]
        # examples do not mix in a batch: the sum's gradient holds each example's own
        gradient = torch.autograd.grad(divergence.sum(), delta)  # one [b,s,d] per pass
        gradient = [g * mask.unsqueeze(-1) for g, mask in zip(gradient, masks, strict=True)]  # 0 on padding
        # |g|_inf of each example over its tokens, units and passes: [passes,b] to [b] to [b,1,1]
        largest = torch.stack([g.abs().amax(dim=(1, 2)) for g in gradient]).amax(0)[:, None, None]
        # a gradient of 0 would divide by 0; with a tiny number the step stays 0, and its size finite
        step = STEP_PER_RADIUS * self.radius * scale / largest.clamp(min=1e-30)
        end = tuple((x + step * g).clamp(-radius, radius) for x, g in zip(start, gradient, strict=True))
        return start, end

    def check(self, task, embeds, start, end, perturbed, divergence):
        """Stop the run if the perturbation changes nothing."""
        vanished = (divergence == 0).all()  # stays on the device, so that only every_process waits for it
        for h, before, after, moved in zip(embeds, start, end, perturbed, strict=True):
            vanished = vanished | (before == after).all() | (moved == h).all()
        if every_process(vanished):
            raise InputError(
                f"--smart_radius {self.radius:g}: the perturbation of a batch of {task.name} vanished in "
                f"{embeds[0].dtype}: raise --smart_radius"
            )

    def penalty(self, model, batch, outputs, exit_weights):
        """l_s between the clean pass and the pass at the end of the ascent. Shapes: [b]."""
        outputs = widen_outputs(model, batch, outputs, exit_weights, self.mixed_precision)
        start, end = self.perturb(model, batch, outputs, exit_weights)
        perturbed = add(outputs.embeds, end)
        # gradients flow through both passes
        noisy = forward_again(model, batch, perturbed, outputs.rng, exit_weights)
        divergence = weighted_divergence(batch.task, noisy, outputs.logits, exit_weights)
        self.check(batch.task, outputs.embeds, start, end, perturbed, divergence)
        return self.weight * divergence


class GaussianSmart(NoiseTerm):
    """SMARTer BERT's simplified SMART: the mean squared change of the logits under Gaussian noise.

    Units: sigma is absolute, in the units of the embeddings, as in the paper.
    Source: SMARTer BERT 4.3, algorithm 1.
    Differs: the paper's formula, 1/2 max L(theta + eps) - L(theta), perturbs the weights, but its algorithm perturbs
        the embeddings. This is the algorithm. Both passes use the same dropout masks, and noise on padding is 0. There
        is one value per example; its mean over the batch is the paper's mean over batch and outputs.
    """

    def __init__(self, tasks, generator, weight=10.0, sigma=GAUSSIAN_SIGMA, mixed_precision=False):
        super().__init__(tasks, generator, weight)
        self.sigma, self.mixed_precision = sigma, mixed_precision

    def penalty(self, model, batch, outputs, exit_weights):
        """Mean over the outputs of the squared change of the logits. Shapes: [b]."""
        outputs = widen_outputs(model, batch, outputs, exit_weights, self.mixed_precision)
        noise = tuple(self.sigma * x for x in self.draw(outputs.embeds, model.masks(batch), batch))
        noisy = forward_again(model, batch, add(outputs.embeds, noise), outputs.rng, exit_weights)
        clean = outputs.logits
        # the mean over the outputs: [b,o] to [b]
        changes = (w * (widen(clean[i]) - widen(noisy[i])).square().mean(-1) for i, w in exit_weights.items())
        return self.weight * sum(changes)


class Bregman(SmoothnessTerm):
    """Bregman proximal point: the divergence from a teacher, the slow average of the model's own weights.

    After every step theta_t <- beta * theta_t + (1 - beta) * theta, from theta_t = theta at the start. If a phase
    trains only some parameters, the teacher's copies of the other parameters still move towards the model's.
    The teacher runs without gradient, in float32 and without dropout. The student's pass is the loop's, with dropout.
    So the term stays above zero even if both have the same weights: with mu = 1 its mean over 200 dev rows is .114 for
    SST, .018 for Quora and .047 for STS (all-MiniLM-L6-v2 as pretrained, heads fitted to 800 training rows each,
    dropout .1 in the layers and .3 before the heads).
    A task gains from the term if it trains on its rows several times; otherwise it may lose (LOG.md).

    Source: Jiang et al. (2020), section 3.2, momentum form; layer-level adaptations 3.1.2.
    Differs: each update takes one step on the proximal problem, as in the authors' code. 3.1.2 has no average: its
        theta_t is the previous iterate. With one step per update this is the model itself, and apart from dropout the
        divergence from itself has no gradient. So the average is what makes the term work.
    """

    def __init__(self, model, weight, tasks):
        super().__init__(tasks, weight)
        self.teacher = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def state_dict(self):
        """The teacher's parameters by name."""
        return {"teacher": self.teacher}

    def load_state_dict(self, state):
        """Continue with a saved teacher."""
        for name, parameter in self.teacher.items():
            parameter.copy_(state["teacher"][name])

    @torch.no_grad()
    def teacher_logits(self, model, batch, exits):
        """The teacher's logits. Shapes: {exit: [b,o]}."""
        modes = {module: module.training for module in model.modules()}  # a frozen BERT is in evaluation mode
        model.eval()  # no dropout
        try:
            with torch.autocast(batch.labels.device.type, enabled=False):
                # the model's code with the teacher's weights
                return torch.func.functional_call(model, self.teacher, (batch,), {"exits": tuple(exits)}).logits
        finally:
            for module, mode in modes.items():
                module.training = mode

    @torch.no_grad()
    def after_step(self, model, progress):
        """Move the teacher towards the model.

        Units: progress is the finished part of the phases with a common learning-rate schedule, from 0 to 1. So each
            layer's phase in stage 1 of SLF has the early decay at its start, and stage 2 at its own.
        """
        decay = EARLY_DECAY if progress < EARLY else LATE_DECAY
        parameters = dict(model.named_parameters())
        # in place, all parameters at once: beta theta_t + (1 - beta) theta
        torch._foreach_lerp_(list(self.teacher.values()), [parameters[name] for name in self.teacher], 1 - decay)

    def penalty(self, model, batch, outputs, exit_weights):
        """l_s between the student's and the teacher's logits. Shapes: [b]."""
        teacher = self.teacher_logits(model, batch, exit_weights)
        return self.weight * weighted_divergence(batch.task, outputs.logits, teacher, exit_weights)


class LNSR(NoiseTerm):
    """Layer-wise noise stability: how far noise on the embeddings moves the hidden states of the layers above.

    The penalty is the squared change of the hidden states. It is a mean over the hidden units, over the real tokens of
    an example (of both texts of a siamese pair) and over the layers from the first to the deepest exit of the step. So
    its size depends on neither width, length nor depth. Gradients flow through both passes.
    The term costs two more passes, because the loop keeps no hidden states. Both draw the same dropout masks. With
    several exits these differ from the masks of the loop's pass, whose heads draw random numbers too.

    Units: sigma is a multiple of the RMS of the embeddings of an example's real tokens.
    Source: Hua et al. (2021), Noise Stability Regularization for Improving BERT Fine-tuning; sigma is the relative
        size of the noise with which its figure 1 shows how unstable a fine-tuned BERT is.
    Differs: in the paper the noise may enter at any layer, and squared norms are summed with a weight per layer. Here
        it enters below layer 1, so that every layer is covered, and all layers have the same weight.
    """

    def hidden(self, model, batch, embeds, rng, stop):
        """Hidden states after the layers 1 .. stop, float32 or wider. Shapes: per layer one [b,s,d] per pass."""
        device = embeds[0].device
        with replay_dropout(rng, device), torch.autocast(device.type, enabled=False):
            return [h for _, h in model.encode(embeds, model.masks(batch), batch.task, 0, stop)]

    def penalty(self, model, batch, outputs, exit_weights):
        """Mean squared change of the hidden states. Shapes: [b]."""
        embeds, masks, stop = tuple(widen(h) for h in outputs.embeds), model.masks(batch), max(exit_weights)
        scale = LNSR_SIGMA * root_mean_square(embeds, masks)  # [b,1,1]
        noise = tuple(scale * x for x in self.draw(embeds, masks, batch))
        clean = self.hidden(model, batch, embeds, outputs.rng, stop)
        noisy = self.hidden(model, batch, add(embeds, noise), outputs.rng, stop)
        change = sum(
            # mean over the units, sum over the real tokens: [b,s,d] to [b,s] to [b]
            ((x - y).square().mean(-1) * mask).sum(-1)
            for layer in zip(clean, noisy, strict=True)
            for x, y, mask in zip(*layer, masks, strict=True)
        )
        return self.weight * change / (stop * sum(mask.sum(-1) for mask in masks))  # over layers and tokens: [b]


# --- the records --------------------------------------------------------------------------------------------------


def add_task_flags(group, name, what, weight, weight_help):
    """Add the two flags of a term: its tasks and its weight. `what` names the term in the help text."""
    group.add_argument(f"--{name}", nargs="*", metavar="TASK", help=f"{what} for the named tasks; none named: all")
    group.add_argument(f"--{name}_weight", type=at_least_zero, default=weight, help=weight_help)


def chosen_tasks(flags, name):
    """The tasks of a term; none if the term is off or its weight is 0."""
    if flags[name] is None or flags[f"{name}_weight"] == 0:
        return ()
    return tuple(flags[name] or flags["tasks"])


def task_conflicts(flags, typed, name, *settings):
    """Conflicts that every term has: settings without the term, and names that are no tasks of the run."""
    names = [f"{name}_{setting}" for setting in settings]
    return [*belongs(typed, names, flags[name] is not None, f"--{name}"), *among_tasks(flags, name)]


# each form, with the name of the argument that --smart_radius sets
SMART_FORMS = {"adversarial": (AdversarialSmart, "radius"), "gaussian": (GaussianSmart, "sigma")}


def add_smart_flags(group):
    """SMART's flags; the defaults of weight and scale are the form's own."""
    add_task_flags(group, "smart", "SMART", None, "weight lambda; default 1, gaussian 10")
    group.add_argument(
        "--smart_form",
        choices=tuple(SMART_FORMS),
        default="adversarial",
        help="worst perturbation within a radius, or Gaussian noise",
    )
    group.add_argument(
        "--smart_radius",
        type=positive,
        help="radius of the perturbation in multiples of the embeddings' RMS, default .03; "
        "gaussian: the noise's standard deviation, default .05",
    )


def build_smart(flags, model, noise):
    """The chosen form of SMART, if it is on."""
    tasks, (form, scale) = chosen_tasks(flags, "smart"), SMART_FORMS[flags["smart_form"]]
    if not tasks:
        return {}
    settings = {"weight": flags["smart_weight"], scale: flags["smart_radius"]}
    settings = {name: value for name, value in settings.items() if value is not None}
    return {"smart": form(tasks, noise("smart"), mixed_precision=flags["precision"] != "fp32", **settings)}


def build_bregman(flags, model, noise):
    """The Bregman term, if it is on."""
    tasks = chosen_tasks(flags, "bregman")
    return {"bregman": Bregman(model, flags["bregman_weight"], tasks)} if tasks else {}


def build_lnsr(flags, model, noise):
    """The noise stability term, if it is on."""
    tasks = chosen_tasks(flags, "lnsr")
    return {"lnsr": LNSR(tasks, noise("lnsr"), flags["lnsr_weight"])} if tasks else {}


SMART = Method(
    "SMART: smooth under perturbed embeddings (BERTer 3.2, SMARTer BERT 4.3)",
    add_flags=add_smart_flags,
    conflicts=lambda flags, typed: task_conflicts(flags, typed, "smart", "form", "weight", "radius"),
    needs=lambda flags: {"embeddings"} if chosen_tasks(flags, "smart") else set(),
    terms=build_smart,
)
BREGMAN = Method(
    "Bregman proximal point: stay close to a slow average (layer-level adaptations 3.1.2)",
    add_flags=lambda group: add_task_flags(group, "bregman", "Bregman proximal point", 1.0, "weight mu"),
    conflicts=lambda flags, typed: task_conflicts(flags, typed, "bregman", "weight"),
    terms=build_bregman,
)
NOISE_STABILITY = Method(
    "layer-wise noise stability (Hua et al. 2021)",
    add_flags=lambda group: add_task_flags(
        group, "lnsr", "noise stability", 1.0, "weight of the penalty, a mean over all hidden numbers: 1 changes little"
    ),
    conflicts=lambda flags, typed: [
        *task_conflicts(flags, typed, "lnsr", "weight"),
        (
            flags["option"] == "pretrain" and bool(chosen_tasks(flags, "lnsr")),
            "--lnsr makes BERT's layers stable, --option pretrain freezes them: leave one out",
        ),
    ],
    needs=lambda flags: {"embeddings"} if chosen_tasks(flags, "lnsr") else set(),
    terms=build_lnsr,
)
