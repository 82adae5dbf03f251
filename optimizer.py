"""AdamW, RMSprop, SGD, learning-rate schedules and gradient clipping; read errors.py before it."""

import math
from functools import partial

import torch

from errors import InputError

# Elements updated at a time on the CPU. A rule reads its tensors several times: pieces of this size are
# still in the processor's cache at the second reading, a whole embedding matrix is not. Measured.
BLOCK = 1 << 19


def check_setting(name, value, limit):
    """Refuse a setting outside [0, limit); NaN and infinity fail as well.

    Raises: InputError that names the setting and its value.
    """
    if not 0 <= value < limit:
        wanted = "a finite number, at least 0" if limit == math.inf else f"at least 0 and below {limit}"
        raise InputError(f"optimiser setting {name} is {value!r}: it must be {wanted}")


def check_eps(value):
    """Refuse an eps that would leave 0/0 where a parameter never had a gradient.

    Raises: InputError that names the value.
    """
    if not 0 < value < math.inf:
        raise InputError(f"optimiser setting eps is {value!r}: it must be a finite number above 0")


def split_into_blocks(tensors):
    """Cut tensors of one shape into matching flat pieces of at most BLOCK elements.

    Tensors that are small, not on the CPU, or not contiguous (they have no flat view) come back whole.
    """
    first = tensors[0]
    on_cpu = first.device.type == "cpu"
    if not on_cpu or first.numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


def square_root(square):
    """The square root. Differs: the reciprocal of the reciprocal root is as exact as the update needs.

    torch's sqrt takes 6 times as long on zeros (rows of words that no batch has used: half of a small BERT) and 25
    times on denormal numbers: 3.6 and 15 ns against .58 for others. This takes .44 ns, and .70 on denormal numbers.
    """
    return square.rsqrt().reciprocal_()


def update_adamw(parameter, gradient, exp_avg, exp_avg_sq, *, beta1, beta2, eps, step_size, decay):
    """Apply AdamW's rule in place: step along the mean gradient over its root mean square, then decay."""
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    parameter.addcdiv_(exp_avg, square_root(exp_avg_sq).add_(eps), value=-step_size)
    if decay:
        parameter.mul_(1 - decay)


def update_rmsprop(parameter, gradient, square_avg, *, gamma, eps, lr, decay):
    """Apply RMSprop's rule in place: step along the gradient over its root mean square, then decay."""
    square_avg.mul_(gamma).addcmul_(gradient, gradient, value=1 - gamma)
    parameter.addcdiv_(gradient, square_root(square_avg).add_(eps), value=-lr)
    if decay:
        parameter.mul_(1 - decay)


def update_sgd(parameter, gradient, momentum_buffer=None, *, momentum, nesterov, lr, decay):
    """Apply the rule of gradient descent with momentum in place, then decay."""
    direction = gradient
    if momentum_buffer is not None:
        direction = momentum_buffer.mul_(momentum).add_(gradient)
        if nesterov:
            direction = gradient.add(momentum_buffer, alpha=momentum)
    parameter.add_(direction, alpha=-lr)
    if decay:
        parameter.mul_(1 - decay)


class BlockOptimizer(torch.optim.Optimizer):
    """The loop over the parameters, which the optimisers share; one without gradient is left wholly alone.

    A subclass has three methods: check(group) raises InputError for bad settings; state_names(group) names
    the tensors, shaped like the parameter, that are kept between steps; rule(group, step) returns the
    function of (parameter, gradient, *state tensors) that makes a parameter's step, counted from 1.
    """

    def add_param_group(self, param_group):
        """Add parameters with settings of their own.

        Raises: InputError for settings out of range.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            names = self.state_names(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state.update({name: torch.zeros_like(parameter) for name in names})
                state["step"] += 1
                update = self.rule(group, state["step"])
                tensors = [parameter, parameter.grad, *(state[name] for name in names)]
                for block in split_into_blocks(tensors):
                    update(*block)
        return loss


class AdamW(BlockOptimizer):
    """Adam with decoupled weight decay, in the form of the CS224N default final project.

    With m and v the running means of g and g^2, after t steps:
        step = lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        p <- (p - step) (1 - lr weight_decay)
    correct_bias=False drops both corrections, as BERT's own training did.

    Raises: InputError for settings out of range.
    Source: Kingma and Ba 2015, end of section 2 (the corrections moved into the step size); Loshchilov and
        Hutter 2019, algorithm 2 (decoupled decay).
    Differs: torch.optim.AdamW divides m / (1 - beta1^t) by sqrt(v / (1 - beta2^t)) + eps_torch. Numerator and
        denominator times sqrt(1 - beta2^t) give the step above with eps = eps_torch sqrt(1 - beta2^t): the
        two agree where torch is given eps / sqrt(1 - beta2^t), anew at each step.
        torch decays first, p <- p (1 - lr weight_decay) - step; from the same p, m and v the result here is
        the larger by lr weight_decay step.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults)

    def check(self, group):
        check_setting("lr", group["lr"], math.inf)
        check_setting("weight_decay", group["weight_decay"], math.inf)
        check_setting("betas[0]", group["betas"][0], 1)
        check_setting("betas[1]", group["betas"][1], 1)
        check_eps(group["eps"])

    def state_names(self, group):
        return "exp_avg", "exp_avg_sq"

    def rule(self, group, step):
        beta1, beta2 = group["betas"]
        step_size = group["lr"]
        if group["correct_bias"]:
            step_size *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        decay = group["lr"] * group["weight_decay"]
        return partial(update_adamw, beta1=beta1, beta2=beta2, eps=group["eps"], step_size=step_size, decay=decay)


class RMSprop(BlockOptimizer):
    """RMSprop: v <- gamma v + (1 - gamma) g^2, then p <- p - lr g / (sqrt(v) + eps).

    Raises: InputError for settings out of range.
    Source: Hinton, Neural Networks for Machine Learning, lecture 6e; BERTer, section 3.2.
    Differs: BERTer's displayed formula lacks the square on g and the eps: without the square v is not a mean
        square, without eps an embedding row that no batch has used divides zero by zero. Weight decay is
        decoupled as in AdamW here; torch.optim.RMSprop adds it to the gradient.
    """

    def __init__(self, params, lr=1e-3, gamma=0.9, eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "gamma": gamma, "eps": eps, "weight_decay": weight_decay})

    def check(self, group):
        check_setting("lr", group["lr"], math.inf)
        check_setting("weight_decay", group["weight_decay"], math.inf)
        check_setting("gamma", group["gamma"], 1)
        check_eps(group["eps"])

    def state_names(self, group):
        return ("square_avg",)

    def rule(self, group, step):
        decay = group["lr"] * group["weight_decay"]
        return partial(update_rmsprop, gamma=group["gamma"], eps=group["eps"], lr=group["lr"], decay=decay)


class SGD(BlockOptimizer):
    """Gradient descent: u <- momentum u + g, then p <- p - lr u, or p - lr (g + momentum u) with Nesterov.

    Raises: InputError for settings out of range.
    Source: Sutskever et al. 2013, section 2, in the form of torch.optim.SGD (lr outside the running sum).
    Differs: weight decay is decoupled as in AdamW here; torch.optim.SGD adds it to the gradient, so that it
        passes through the momentum.
    """

    def __init__(self, params, lr=1e-3, momentum=0.0, nesterov=False, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def check(self, group):
        check_setting("lr", group["lr"], math.inf)
        check_setting("weight_decay", group["weight_decay"], math.inf)
        check_setting("momentum", group["momentum"], 1)
        if group["nesterov"] and group["momentum"] == 0:
            raise InputError("optimiser setting nesterov is on while momentum is 0: give a momentum above 0")

    def state_names(self, group):
        return ("momentum_buffer",) if group["momentum"] else ()

    def rule(self, group, step):
        decay = group["lr"] * group["weight_decay"]
        momentum, nesterov = group["momentum"], group["nesterov"]
        return partial(update_sgd, momentum=momentum, nesterov=nesterov, lr=group["lr"], decay=decay)


def constant(progress, warmup=0.0):
    """The multiplier of the learning rate: rises from 0 during warm-up, then stays 1.

    Units: progress and warmup are fractions of the whole training, in [0, 1].
    """
    return progress / warmup if progress < warmup else 1.0


def linear(progress, warmup=0.0):
    """The multiplier of the learning rate: rises from 0 during warm-up, then falls in a straight line to 0.

    Units: progress and warmup are fractions of the whole training, in [0, 1].
    Source: Devlin et al. 2019, appendix A.2.
    """
    if progress <= warmup:
        return constant(progress, warmup)
    return (1 - progress) / (1 - warmup)


def cosine(progress, warmup=0.0):
    """The multiplier of the learning rate: rises from 0 during warm-up, then falls along half a cosine to 0.

    Units: progress and warmup are fractions of the whole training, in [0, 1].
    Source: Loshchilov and Hutter 2017, equation 5, without restarts.
    """
    if progress <= warmup:
        return constant(progress, warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}


def clip_gradients(parameters, max_norm):
    """Scale all gradients so that their joint Euclidean norm is at most max_norm; return the norm before.

    The norm stays on the gradients' device, so that the host need not wait for it; nothing here checks that
    it is finite.

    Shapes: the norm has no dimensions.
    Raises: InputError for a max_norm that is not above 0.
    Source: Pascanu et al. 2013, algorithm 1.
    """
    if not max_norm > 0:
        raise InputError(f"the maximal gradient norm is {max_norm!r}: it must be above 0")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    # on the CPU looking at the factor costs nothing and can save a pass over all gradients
    if norm.device.type != "cpu" or factor != 1:
        torch._foreach_mul_(gradients, factor)
    return norm


def parameter_groups(named_parameters, weight_decay):
    """Put the trainable parameters into a group with weight decay and a group without.

    Biases and LayerNorm weights, the parameters of fewer than two dimensions, are not decayed. A group that
    would be empty is left out.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() >= 2]
    vectors = [parameter for parameter in trainable if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
