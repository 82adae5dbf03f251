"""Checks of part slf: the phases of two training plans."""

import math

from slf import plain, sequential_layer_focus, smart_alternating


def describe(phase, model):
    """Return everything of a phase but its label, as text."""
    chosen = {id(parameter) for module in phase.modules(model) for parameter in module.parameters()}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    # the parameters by the modules that contain them
    trained = sorted({".".join(name.split(".")[:3]) for name in names})
    weights = [{i: round(float(w), 6) for i, w in entry.items()} for entry in phase.exit_weights]
    part, without = tuple(phase.part), sorted(term.__name__ for term in phase.without)
    return (
        f"{phase.fraction:.6f} epochs, exit weights {weights}, part {part}, without {without}\n"
        f"    keep {phase.keep}, scored {phase.scored}, trains {' '.join(trained)}"
    )


def follow(plan, scores, model):
    """Run a plan with these scores; return its phases as text."""
    phases, scores = [], iter(scores)
    phase = next(plan)
    while True:
        phases.append(describe(phase, model))
        try:
            phase = plan.send(next(scores, 0.5))
        except StopIteration:
            return "\n".join(f"{i + 1}. {phase}" for i, phase in enumerate(phases))


def draw_model(draw):
    """Return a model with exits."""
    return draw.model(layers=2 + draw.size, with_exits=True)


def layers(draw):
    """Follow the first stage for several lengths."""
    model, results = draw_model(draw), {}
    for epochs in (0.25, 1.0, 2.5)[: 1 + draw.size]:
        plan = sequential_layer_focus(model.depth, epochs, plain(1, ({model.depth: 1.0},)))
        results[f"phases with {epochs} epochs a layer"] = follow(plan, [], model)
    return results


def second_stage(draw):
    """Put a plan behind the first stage that notes the scores it receives."""
    model, received = draw_model(draw), []

    def second():
        for phase in plain(2 + draw.size, ({model.depth: 1.0},)):
            received.append((yield phase))

    scores = [round(draw.uniform(0, 1), 3) for _ in range(model.depth + 2 + draw.size)]
    draw.show(scores=scores)
    phases = follow(sequential_layer_focus(model.depth, 0.5, second()), scores, model)
    return {"phases": phases, "scores that the second plan received": str(received)}


def stages(draw, scores, model):
    """Return the stages A and B that Smart Alternating chooses."""
    joint = {i: 0.5 for i in range(1, model.depth + 1)}
    plan, chosen, values = smart_alternating(len(scores), model.depth, joint), "", iter(scores)
    phase = next(plan)
    while phase is not None:
        chosen += "A" if len(phase.exit_weights[0]) == 1 else "B"
        try:
            phase = plan.send(next(values))
        except StopIteration:
            phase = None
    return chosen


def alternating(draw):
    """Send scores that rise, fall, stay the same, and are not a number."""
    model, results = draw_model(draw), {}
    cases = [[0.5, 0.6, 0.6, 0.5, 0.7], [0.5, 0.4, math.nan, 0.5, 0.6]]
    cases += [[round(draw.uniform(0, 1), 1) for _ in range(8)] for _ in range(4 * draw.size)]
    for scores in cases:
        results[f"stages for the scores {scores}"] = stages(draw, scores, model)
    return results


def weights(draw):
    """Look at the phases of both stages."""
    model = draw_model(draw)
    joint = {i: round(draw.uniform(0.1, 1), 2) for i in range(1, model.depth + 1)}
    draw.show(joint=str(joint), scores="falling")
    size = draw.choice((0.5, 1.0))
    plan = smart_alternating(3 + draw.size, model.depth, joint, size)
    return {"phases": follow(plan, [0.5, 0.4, 0.3, 0.2, 0.1], model)}
