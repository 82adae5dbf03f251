"""AdamW, RMSprop and SGD, learning-rate schedules, gradient clipping, and a learning rate for each layer.

With p a parameter, g its gradient, t the number of its updates so far, this one included, and lr the learning rate:

    AdamW    m <- beta1 m + (1 - beta1) g           v <- beta2 v + (1 - beta2) g^2
             p <- p - lr sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
    RMSprop  v <- gamma v + (1 - gamma) g^2         p <- p - lr g / (sqrt(v) + eps)
    SGD      p <- p - lr g

Each rule ends with decoupled weight decay, p <- p - p (lr weight_decay). In every training step the loop computes lr
as the peak learning rate times the schedule's factor times the factor of the parameter's group.
The end of the file makes the updates fast, on a CPU and on a GPU, and checks the settings.
"""

import argparse
import math

import torch

from errors import InputError
from methods import Method, positive

# --- update rules -------------------------------------------------------------------------------------------------


class Optimizer(torch.optim.Optimizer):
    """The loop over the parameters. It skips a parameter that has no gradient: neither value nor state changes.

    A subclass names in `state_names` the tensors that it keeps for each parameter between steps. `learning_rates` are
    its defaults of --lr: {what is trained: (for a small BERT, for a larger one)}. Its `update` is the rule for one
    parameter. Its `check(group)` raises InputError for bad settings other than lr and weight_decay.

    On a CPU `update` receives tensors, elsewhere lists of tensors with the same methods: see Tensors at the end of the
    file.
    """

    state_names = ()

    def check(self, group):
        """Refuse bad values of the settings that only this rule has."""

    def add_param_group(self, param_group):
        """Add parameters with settings of their own.

        Raises: InputError for settings out of range.
        """
        settings = {**self.defaults, **param_group}
        check_setting("lr", settings["lr"])
        check_setting("weight_decay", settings["weight_decay"])
        self.check(settings)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient. With a closure, compute the loss first and return it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_count = {}  # {number of updates: [the tensors of each parameter with this number]}
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = 0
                    state |= {name: torch.zeros_like(parameter) for name in self.state_names}
                state["step"] += 1  # a count per parameter: a head has gradients only in the steps of its task
                tensors = [parameter, parameter.grad, *(state[name] for name in self.state_names)]
                by_count.setdefault(state["step"], []).append(tensors)
            for t, of_parameters in by_count.items():
                for tensors in arrange(of_parameters):
                    self.update(*tensors, t=t, group=group)
        return loss


class AdamW(Optimizer):
    """Adam with decoupled weight decay, in the form of the CS224N default final project.

    correct_bias=False drops both factors with t, as BERT's own training did.

    Raises: InputError for settings out of range.
    Source: Kingma and Ba 2015, end of section 2 (the corrections are part of the step size); Loshchilov and
        Hutter 2019, algorithm 2 (decoupled decay).
    Differs: torch.optim.AdamW adds its eps to sqrt(v / (1 - beta2^t)), here eps is added to sqrt(v). torch takes the
        same step if its eps is set to eps / sqrt(1 - beta2^t) before every step.
        torch decays before the step, p <- p (1 - lr weight_decay) - step. The two results differ by
        lr * weight_decay * step. Algorithm 2 also decays the old p, by the schedule's factor times weight_decay: its
        decay does not grow with lr.
    """

    state_names = ("exp_avg", "exp_avg_sq")  # m and v
    learning_rates = {"finetune": (1e-4, 2e-5), "pretrain": (1e-3, 1e-3), "adapter": (2e-3, 3e-4)}

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, correct_bias=correct_bias)
        super().__init__(params, defaults)

    def check(self, group):
        check_setting("betas[0]", group["betas"][0], below=1)
        check_setting("betas[1]", group["betas"][1], below=1)
        check_eps(group["eps"])

    @staticmethod
    def update(p, g, m, v, t, group):
        """Update a parameter p and its means in place at its t-th step. Shapes: p, g, m and v are alike."""
        lr, (beta1, beta2) = group["lr"], group["betas"]
        m.lerp_(g, 1 - beta1)  # m <- beta1 m + (1 - beta1) g
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)  # v <- beta2 v + (1 - beta2) g^2
        step_size = lr
        if group["correct_bias"]:
            # m and v start at 0: after t steps their weights sum to 1 - beta^t instead of 1
            step_size *= math.sqrt(1 - beta2**t) / (1 - beta1**t)
        p.addcdiv_(m, square_root(v).add_(group["eps"]), value=-step_size)  # p <- p - step_size m / (sqrt(v) + eps)
        if group["weight_decay"]:
            # decoupled: the decay does not pass through m and v. Not p (1 - lr weight_decay): in float32 a factor
            # 1 - 1e-7 is rounded to 1 - 1.2e-7
            p.add_(p, alpha=-lr * group["weight_decay"])


class RMSprop(Optimizer):
    """Step against the gradient, divided by the running root mean square of past gradients.

    Raises: InputError for settings out of range.
    Source: Hinton, Neural Networks for Machine Learning, lecture 6e; BERTer, section 3.2.
    Differs: BERTer's displayed formula has neither the square on g nor the eps. Without the square v is not a mean
        square. Without eps an embedding row that no batch has used divides zero by zero. Weight decay is decoupled
        as in AdamW here; torch.optim.RMSprop adds it to the gradient.
    """

    state_names = ("square_avg",)  # v
    learning_rates = {"finetune": (1e-4, 1e-5), "pretrain": (1e-3, 1e-3), "adapter": (2e-3, 3e-4)}

    def __init__(self, params, lr=1e-3, gamma=0.9, eps=1e-8, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, gamma=gamma, eps=eps, weight_decay=weight_decay))

    def check(self, group):
        check_setting("gamma", group["gamma"], below=1)
        check_eps(group["eps"])

    @staticmethod
    def update(p, g, v, t, group):
        """Update a parameter p and its mean square in place. Shapes: p, g and v are alike."""
        lr, gamma = group["lr"], group["gamma"]
        v.mul_(gamma).addcmul_(g, g, value=1 - gamma)  # v <- gamma v + (1 - gamma) g^2
        p.addcdiv_(g, square_root(v).add_(group["eps"]), value=-lr)  # p <- p - lr g / (sqrt(v) + eps)
        if group["weight_decay"]:
            p.add_(p, alpha=-lr * group["weight_decay"])  # decoupled: the decay does not pass through v


class SGD(Optimizer):
    """Stochastic gradient descent: step against the gradient of a batch.

    Raises: InputError for settings out of range.
    Differs: weight decay is decoupled as in AdamW here; torch.optim.SGD adds it to the gradient.
    """

    learning_rates = {"finetune": (0.3, 1e-2), "pretrain": (1e-1, 1e-1), "adapter": (1e-1, 1e-1)}

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay))

    @staticmethod
    def update(p, g, t, group):
        """Update a parameter p in place. Shapes: p and g are alike."""
        p.add_(g, alpha=-group["lr"])  # p <- p - lr g
        if group["weight_decay"]:
            p.add_(p, alpha=-group["lr"] * group["weight_decay"])


OPTIMIZERS = {"adamw": AdamW, "rmsprop": RMSprop, "sgd": SGD}


# --- schedules: (progress, warmup) -> factor of the learning rate -------------------------------------------------
# Both arguments are fractions, from 0 to 1, of the training, or of the phases that share a schedule (slf.py).


def constant(progress, warmup=0.0):
    """Rise from 0 to 1 during warm-up, then stay at 1."""
    return progress / warmup if progress < warmup else 1.0


def linear(progress, warmup=0.0):
    """Rise from 0 to 1 during warm-up, then fall in a straight line to 0.

    Source: Devlin et al. 2019, appendix A.2.
    """
    if progress <= warmup:
        return constant(progress, warmup)  # the same rise
    return (1 - progress) / (1 - warmup)


def cosine(progress, warmup=0.0):
    """Rise from 0 to 1 during warm-up, then fall along half a cosine to 0.

    Source: Loshchilov and Hutter 2017, equation 5, without restarts.
    """
    if progress <= warmup:
        return constant(progress, warmup)  # the same rise
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


SCHEDULES = {"constant": constant, "linear": linear, "cosine": cosine}


# --- gradient clipping and parameter groups -----------------------------------------------------------------------


def clip_gradients(parameters, max_norm):
    """Scale all gradients so that their joint Euclidean norm is at most max_norm; return the norm before.

    The norm stays on the gradients' device, so that the CPU never waits for a GPU. It may be infinite or NaN.

    Shapes: the norm has no dimensions.
    Raises: InputError for a max_norm that is not above 0.
    Source: Pascanu et al. 2013, algorithm 1.
    """
    if not max_norm > 0:
        raise InputError(f"the maximal gradient norm is {max_norm!r}: it must be above 0")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return torch.zeros(())
    # the norm of all numbers is the norm of the tensors' norms: n tensors to [n] to []
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch's clip_grad_norm_
    # in place. On a CPU, reading the factor is free, and a factor of 1 saves a pass over all gradients
    if norm.device.type != "cpu" or factor != 1:
        torch._foreach_mul_(gradients, factor)
    return norm


def parameter_groups(named_parameters, weight_decay, rates=None):
    """Group the trainable parameters by weight decay and by their factor of the learning rate.

    Biases and LayerNorm's parameters do not decay. They have fewer than two dimensions.
    `rates` is {parameter name: factor}; an absent name has factor 1. A group stores its factor under "rate", and the
    loop multiplies the learning rate by it. The group with the largest factor comes first.
    """
    groups = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            key = (rates or {}).get(name, 1.0), parameter.dim() >= 2
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": groups[rate, is_matrix], "weight_decay": weight_decay if is_matrix else 0.0, "rate": rate}
        for rate, is_matrix in sorted(groups, reverse=True)  # decayed before not decayed
    ]


# --- layer-wise learning-rate decay -------------------------------------------------------------------------------


def layer_rates(model, decay):
    """The factor of the learning rate of each parameter, smaller in lower layers: {parameter name: factor}.

    Layer i of L has the factor decay^(L - i). The embeddings are below layer 1 and have decay^L. Everything else has
    factor 1, because it learns the tasks: the pooler, the heads, the exits, and adapters inside the layers.

    Source: Howard and Ruder (2018), ULMFiT, section 3.2 (discriminative fine-tuning); Sun et al. (2019), "How to
        Fine-Tune BERT for Text Classification?" (layer-wise decreasing layer rate).
    Differs: Howard and Ruder divide by 2.6 from layer to layer, which is decay = .38; Sun et al. recommend .95. Both
        have one head; here every head of every task and exit trains at the full rate. Weight decay falls with the
        learning rate, because a step decays by lr * weight_decay.
    """
    bert, depth = model.bert, len(model.bert.bert_layers)
    below = (bert.word_embedding, bert.pos_embedding, bert.tk_type_embedding, bert.embed_layer_norm)
    height = {parameter: 0 for module in below for parameter in module.parameters()}
    for i, layer in enumerate(bert.bert_layers, start=1):
        height |= dict.fromkeys(layer.parameters(), i)
    return {name: decay ** (depth - height.get(p, depth)) for name, p in model.named_parameters()}


def decay_factor(text):
    """A type of flag: a number above 0 and at most 1."""
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is above 1")
    return value


LAYER_DECAY = Method(
    "layer-wise learning rates (Howard and Ruder 2018; Sun et al. 2019)",
    add_flags=lambda group: group.add_argument(
        "--layer_decay",
        type=decay_factor,
        default=1.0,
        help="factor of the learning rate from each layer to the layer below; 1: off",
    ),
    conflicts=lambda flags, typed: [
        (
            flags["layer_decay"] < 1 and flags["option"] == "pretrain",
            "--layer_decay lowers the learning rates of BERT's layers, --option pretrain freezes them: leave one out",
        ),
        (
            flags["layer_decay"] < 1 and flags["adapter"] != ["none"] and not flags["train_backbone"],
            "--layer_decay lowers the learning rates of BERT's layers, --adapter freezes them: add --train_backbone",
        ),
    ],
    rates=lambda flags, model: layer_rates(model, flags["layer_decay"]) if flags["layer_decay"] < 1 else {},
)


# --- speed --------------------------------------------------------------------------------------------------------

# Elements that are updated at a time on the CPU. A rule reads its tensors several times. A block of this size is
# still in the processor's cache at the second reading; an entire embedding matrix is not. The size was measured.
BLOCK = 1 << 19


def arrange(rows):
    """Arrange the tensors of some parameters for the calls of an update rule, one element for each call.

    On a CPU a call receives a block of one parameter. On other devices one call receives all parameters, because
    starting a kernel for a small parameter takes longer than the kernel itself.
    """
    if rows[0][0].device.type != "cpu":
        return [[Tensors(column) for column in zip(*rows, strict=True)]]
    return (block for tensors in rows for block in split_into_blocks(tensors))


class Tensors(list):
    """The same tensor of many parameters, such as all their gradients, with the methods of one tensor.

    A method starts one of torch's foreach operations, which covers all tensors in a few kernels. For example
    `m.lerp_(g, 0.1)` runs torch._foreach_lerp_(m, g, 0.1). So an update rule is written once, for one parameter.
    """

    def __getattr__(self, name):
        operation = getattr(torch, f"_foreach_{name}")

        def run(*arguments, **options):
            result = operation(self, *arguments, **options)
            return self if result is None else Tensors(result)  # an operation in place returns nothing

        return run


def split_into_blocks(tensors):
    """Cut tensors of one shape into matching flat blocks of at most BLOCK elements.

    Small tensors and tensors without a flat view (not contiguous) are not cut.
    """
    if tensors[0].numel() <= BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    # views, so that a rule that updates a block in place updates the tensor
    return zip(*(tensor.view(-1).split(BLOCK) for tensor in tensors), strict=True)


def square_root(square):
    """The square root of each number, as a new tensor.

    torch's sqrt is slow on a CPU for zeros (1.4 to 3.6 ns a number instead of .5) and for denormal numbers (10 to
    15 ns). Zeros are frequent: half of a small BERT are embeddings of words that no batch has used. The reciprocal of
    the reciprocal root takes .44 ns, and .70 ns for denormal numbers.

    Differs: in float32 the relative error is at most 1.3e-7, that of torch's sqrt .9e-7.
    """
    if isinstance(square, Tensors):
        return square.sqrt()
    return square.rsqrt().reciprocal_()


# --- checks of the settings ---------------------------------------------------------------------------------------


def check_setting(name, value, below=math.inf):
    """Refuse a setting outside [0, below), and NaN.

    Raises: InputError that names the setting and its value.
    """
    if not 0 <= value < below:
        wanted = "a finite number, at least 0" if below == math.inf else f"at least 0 and below {below}"
        raise InputError(f"optimiser setting {name} is {value!r}: it must be {wanted}")


def check_eps(value):
    """Refuse an eps of 0: a parameter whose gradients were all 0 would divide 0 by 0.

    Raises: InputError that names the value.
    """
    if not 0 < value < math.inf:
        raise InputError(f"optimiser setting eps is {value!r}: it must be a finite number above 0")
