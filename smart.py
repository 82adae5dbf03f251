"""Loss terms that keep the function smooth: SMART (two forms), Bregman proximal point, LNSR. Read first: tasks.py.

A model that answers differently when its input barely moves has memorised, so each term here adds a price for moving.
With x the embeddings of an example (what enters layer 1), f(x; theta) its logits and l_s the task's divergence
(symmetrised KL for classes, squared difference for values; tasks.py), the loss L becomes L plus one of

    AdversarialSmart   lambda * max over |delta|_inf <= radius of l_s(f(x + delta), f(x))      the worst small move
    GaussianSmart      lambda * mean over the outputs of (f(x + noise) - f(x))^2               a random small move
    Bregman            mu * l_s(f(x; theta), f(x; theta_t)), theta_t a slow average of theta   a move of the weights
    LNSR               lambda * mean over layers r and units of (h_r(x + noise) - h_r(x))^2    a move inside the model

The maximum is approximated: a small random start delta_0 (at delta = 0 the divergence has no slope), one step up
the gradient, clipped into the box: delta = clip(delta_0 + step * g / |g|_inf, -radius, radius).

With early exit f has one output per exit, and a term is the sum over the step's exits with their weights (LNSR: over
the layers up to the deepest of them).
Two passes are compared under the same dropout masks, otherwise the price has a floor that no smoothness lowers
(Bregman's teacher has no dropout at all: see there). Noise is 0 on padding and comes from a generator of its own.

Sources: Jiang et al. (2020), SMART; BERTer 3.2; SMARTer BERT 4.3; layer-level adaptations 3.1, 2.3; Hua et al. (2021).
"""

from contextlib import contextmanager

import torch

from bert import dropout_state
from errors import InputError
from parallel import every_process
from tasks import widen

# radius, step and start noise of the adversarial form, in units of the embeddings' RMS; chosen by measurement, in
# the proportions of the published values
RADIUS, STEP, NOISE = 0.03, 3.0, 0.03
# decay of the teacher's average: early, and from this share of the training on
EARLY_DECAY, LATE_DECAY, EARLY_SHARE = 0.99, 0.999, 0.1


@contextmanager
def replay_dropout(rng, device):
    """Draw dropout masks from a saved generator state; afterwards go on as if nothing had been drawn."""
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


def root_mean_square(hidden, masks):
    """RMS of the numbers of each example's real tokens, of all passes together.

    One value per example, so that no example's noise depends on which others share its batch.
    Shapes: one [b,s,d] and one [b,s] per pass -> [b,1,1].
    """
    squares = [(h.detach().square() * mask.unsqueeze(-1)).sum((1, 2)) for h, mask in zip(hidden, masks, strict=True)]
    tokens = sum(mask.sum(-1) for mask in masks)
    return (sum(squares) / (tokens * hidden[0].shape[-1])).sqrt()[:, None, None]


def add(xs, ys):
    """Sums of two tuples of tensors."""
    return tuple(x + y for x, y in zip(xs, ys, strict=True))


class NoiseTerm:
    """What the terms with noise share: the weight, the noise and the generator's saved state."""

    def __init__(self, generator, weight):
        self.generator, self.weight = generator, weight

    def state_dict(self):
        """The noise generator's state."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state):
        """Go on drawing where the saved run was."""
        self.generator.set_state(state["generator"].cpu())

    def draw(self, hidden, masks, share=None):
        """Standard normal noise, 0 on padding; drawn for all rows of a batch that processes share, to take ours.

        Shapes: one [b,s,d] per encoder pass.
        """
        positions, rows = share or (slice(None), len(hidden[0]))
        how = dict(generator=self.generator, device=self.generator.device)
        noise = (torch.randn(rows, *h.shape[1:], dtype=h.dtype, **how)[positions].to(h.device) for h in hidden)
        return tuple(x * mask.unsqueeze(-1) for x, mask in zip(noise, masks, strict=True))


class SmartTerm(NoiseTerm):
    """What both forms of SMART share: the tasks they are for, and the clean pass they compare with.

    `mixed_precision` says that the loop's forward ran under autocast. Its outputs, rounded to a few digits, are then
    no measure for a small change, and the term runs a clean float32 pass of its own.
    """

    def __init__(self, tasks, generator, weight, mixed_precision):
        super().__init__(generator, weight)
        self.tasks, self.mixed_precision = tuple(tasks), mixed_precision

    def __call__(self, model, batch, outputs, exit_weights):
        """The term of each example; zeros for a task that it is not for. Shapes: [b]."""
        if batch.task.name not in self.tasks:
            return torch.zeros(len(batch), device=batch.labels.device)
        embeds, clean = tuple(widen(h) for h in outputs.embeds), outputs.logits
        if self.mixed_precision:
            clean = forward_again(model, batch, embeds, outputs.rng, exit_weights)
        return self.weight * self.penalty(model, batch, embeds, clean, outputs.rng, exit_weights)


class AdversarialSmart(SmartTerm):
    """SMART's smoothness-inducing adversarial regularisation: lambda times the divergence after the worst small move.

    The step is so long against the radius that four coordinates in five end on the edge of the box, as with the
    published values (step 1e-3, radius and start 1e-5, absolute). Those are too small: measured on dev sentences with
    all-MiniLM-L6-v2, the penalty is about 2e-8, which added to the loss in float32 does not change it; in bf16 one
    number in fifty changes at all, and the divergence is rounding: hundreds of times that penalty, or exactly 0. Hence
    relative sizes and float32 passes. The published values are still to be had: as 2e-5, 2e-3, 2e-5.
    In float32 training the loop's clean pass is reused, and the ascent computes no parameter's gradient: a step costs
    8 units where a plain one costs 3 (a forward pass 1, a full backward pass 2, one to the embeddings alone 1).
    A step waits for the device once, for the flag that says whether the perturbation vanished.

    Units: radius, step and noise (standard deviation of the start) are multiples of the RMS of the embeddings of an
        example's real tokens.
    Raises: InputError where the perturbation vanished: the step left the start as it was, the embeddings did not
        change in the working precision, or no output of the batch did.
    Source: Jiang et al. (2020), section 3.1, algorithm 1 (K = 1); BERTer 3.2.
    Differs: the gradient is normalised per example over all its tokens and encoder passes (the authors' code:
        per token); the start is clipped into the box too.
    """

    def __init__(self, tasks, generator, weight=1.0, radius=RADIUS, step=STEP, noise=NOISE, mixed_precision=False):
        super().__init__(tasks, generator, weight, mixed_precision)
        self.radius, self.step, self.noise = radius, step, noise

    def divergence(self, task, noisy, clean, exit_weights):
        """l_s summed over the exits with their weights. Shapes: [b]."""
        return sum(w * task.divergence(noisy[i], clean[i]) for i, w in exit_weights.items())

    def perturb(self, model, batch, embeds, clean, rng, exit_weights):
        """The random start and the perturbation after the ascent step. Shapes: tuples of [b,s,d]."""
        masks = model.masks(batch)
        scale = root_mean_square(embeds, masks)
        radius = self.radius * scale
        start = tuple((self.noise * scale * x).clamp(-radius, radius) for x in self.draw(embeds, masks, batch.share))
        moves = tuple(x.clone().requires_grad_() for x in start)
        noisy = forward_again(model, batch, add([h.detach() for h in embeds], moves), rng, exit_weights)
        fixed = {i: clean[i].detach() for i in exit_weights}
        slope = torch.autograd.grad(self.divergence(batch.task, noisy, fixed, exit_weights).sum(), moves)
        slope = [g * mask.unsqueeze(-1) for g, mask in zip(slope, masks, strict=True)]
        steepest = torch.stack([g.abs().amax(dim=(1, 2)) for g in slope]).amax(0)[:, None, None]  # [b,1,1]
        length = self.step * scale / steepest.clamp(min=torch.finfo(steepest.dtype).tiny)
        final = tuple((x + length * g).clamp(-radius, radius) for x, g in zip(start, slope, strict=True))
        return start, final

    def check(self, task, embeds, start, final, perturbed, divergence):
        """Stop the run where the perturbation changes nothing."""
        vanished = (divergence == 0).all()
        for h, before, after, moved in zip(embeds, start, final, perturbed, strict=True):
            vanished = vanished | (before == after).all() | (moved == h).all()
        if every_process(vanished):
            raise InputError(
                f"--smart_radius {self.radius:g} --smart_step {self.step:g} --smart_noise {self.noise:g}: the "
                f"perturbation of a batch of {task.name} vanished in {embeds[0].dtype}: raise them"
            )

    def penalty(self, model, batch, embeds, clean, rng, exit_weights):
        """l_s between the clean pass and that at the end of the ascent. Shapes: [b]."""
        start, final = self.perturb(model, batch, embeds, clean, rng, exit_weights)
        perturbed = add(embeds, final)
        noisy = forward_again(model, batch, perturbed, rng, exit_weights)
        divergence = self.divergence(batch.task, noisy, clean, exit_weights)
        self.check(batch.task, embeds, start, final, perturbed, divergence)
        return divergence


class GaussianSmart(SmartTerm):
    """SMARTer BERT's simplified SMART: lambda times the mean squared change of the logits under Gaussian noise.

    Units: sigma is absolute, in units of the embeddings, as in the paper.
    Source: SMARTer BERT 4.3, algorithm 1.
    Differs: the formula displayed there, 1/2 max L(theta + eps) - L(theta), disturbs the weights and is not what the
    algorithm below it does; this is the algorithm. The same dropout masks in both passes, no noise on padding; one
    value per example, whose mean over the batch is the paper's mean over batch and outputs.
    """

    def __init__(self, tasks, generator, weight=10.0, sigma=0.05, mixed_precision=False):
        super().__init__(tasks, generator, weight, mixed_precision)
        self.sigma = sigma

    def penalty(self, model, batch, embeds, clean, rng, exit_weights):
        """Mean over the outputs of the squared change of the logits. Shapes: [b]."""
        noise = tuple(self.sigma * x for x in self.draw(embeds, model.masks(batch), batch.share))
        noisy = forward_again(model, batch, add(embeds, noise), rng, exit_weights)
        return sum(w * (widen(clean[i]) - widen(noisy[i])).square().mean(-1) for i, w in exit_weights.items())


class Bregman:
    """Bregman proximal point: mu times the divergence from a teacher, the slow average of the model's own weights.

    theta_t = beta * theta_t + (1 - beta) * theta after every step; at the start theta_t = theta. In a phase that trains
    some parameters only, the teacher's others move on towards the model's.
    The teacher runs without gradient, in float32, and without dropout; the student's pass is the loop's, with
    dropout. So the term has a floor that no closeness lowers: even for theta_t = theta the two answers differ. As
    measured, mu = 1, all-MiniLM-L6-v2 with pretrained layers and heads fitted to 800 training rows each, dropout .1
    in the layers and .3 before the heads, mean over 200 dev rows: SST .114, Quora .018, STS .047.

    `tasks` names those that it is for; None: all. A task that repeats its data gains by it, one that does not may lose
    (LOG.md).

    Source: Jiang et al. (2020), section 3.2, momentum form; layer-level adaptations 3.1.2.
    Differs: one step of the proximal problem per update, as in the authors' code. 3.1.2 has no momentum: its theta_t is
    the previous iterate. With one step per update that is the model itself, whose divergence from itself has no
    gradient (but for dropout), so the average is what makes the term work.
    """

    def __init__(self, model, weight=1.0, tasks=None):
        self.weight, self.tasks = weight, tasks
        self.teacher = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point()
        }

    def state_dict(self):
        """The teacher's parameters by name."""
        return {"teacher": self.teacher}

    def load_state_dict(self, state):
        """Go on with a saved teacher."""
        for name, parameter in self.teacher.items():
            parameter.copy_(state["teacher"][name])

    @torch.no_grad()
    def answer(self, model, batch, exits):
        """The teacher's logits. Shapes: {exit: [b,o]}."""
        training = model.training
        model.eval()
        try:
            with torch.autocast(batch.labels.device.type, enabled=False):
                return torch.func.functional_call(model, self.teacher, (batch,), {"exits": tuple(exits)}).logits
        finally:
            model.train(training)

    @torch.no_grad()
    def after_step(self, model, progress):
        """Move the teacher towards the model.

        Units: progress is the share that is done of the phases that share a learning-rate schedule, so a plan with two
        stages has the early decay in each.
        """
        decay = EARLY_DECAY if progress < EARLY_SHARE else LATE_DECAY
        parameters = dict(model.named_parameters())
        for name, parameter in self.teacher.items():
            parameter.lerp_(parameters[name], 1 - decay)

    def __call__(self, model, batch, outputs, exit_weights):
        """The term of each example; zeros for a task that it is not for. Shapes: [b]."""
        if self.tasks and batch.task.name not in self.tasks:
            return torch.zeros(len(batch), device=batch.labels.device)
        teacher = self.answer(model, batch, exit_weights)
        divergence = batch.task.divergence
        return self.weight * sum(w * divergence(outputs.logits[i], teacher[i]) for i, w in exit_weights.items())


class LNSR(NoiseTerm):
    """Layer-wise noise stability: lambda times how far noise on the embeddings moves the hidden states above.

    The term is the squared change, averaged over the hidden units, over an example's real tokens (of both passes of
    a siamese pair) and over the layers from the first to the deepest exit of the step, so that its size depends on
    neither width, length nor depth. Gradients flow through the clean and the noisy states. It costs two more passes,
    since the loop keeps no hidden states; they have no heads, so that with exits after several layers their dropout
    masks are each other's and not those of the loop.

    Units: sigma is a multiple of the RMS of the embeddings of an example's real tokens.
    Source: Hua et al. (2021), Noise Stability Regularization for Improving BERT Fine-tuning; sigma is the relative
        size of the noise with which its figure 1 shows how unstable a fine-tuned BERT is.
    Differs: the paper lets the noise enter at any layer and sums squared norms with a weight per layer; here it enters
        below layer 1, so that every layer is covered, and all layers weigh the same.
    """

    def __init__(self, generator, weight=1.0, sigma=0.05):
        super().__init__(generator, weight)
        self.sigma = sigma

    def states(self, model, batch, embeds, rng, stop):
        """Hidden states after the layers 1 .. stop, float32 or wider. Shapes: per layer one [b,s,d] per pass."""
        device = embeds[0].device
        with replay_dropout(rng, device), torch.autocast(device.type, enabled=False):
            return [h for _, h in model.encode(embeds, model.masks(batch), batch.task, 0, stop)]

    def __call__(self, model, batch, outputs, exit_weights):
        """The term of each example. Shapes: [b]."""
        embeds, masks, stop = tuple(widen(h) for h in outputs.embeds), model.masks(batch), max(exit_weights)
        scale = self.sigma * root_mean_square(embeds, masks)
        noise = tuple(scale * x for x in self.draw(embeds, masks, batch.share))
        clean = self.states(model, batch, embeds, outputs.rng, stop)
        noisy = self.states(model, batch, add(embeds, noise), outputs.rng, stop)
        change = sum(
            ((x - y).square().mean(-1) * mask).sum(-1)  # [b,s,d], [b,s], [b]
            for layer in zip(clean, noisy, strict=True)
            for x, y, mask in zip(*layer, masks, strict=True)
        )
        return self.weight * change / (stop * sum(mask.sum(-1) for mask in masks))
