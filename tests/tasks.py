"""What methods are tested on: tasks that train in a second, and a stage that has been started on one.

    import tasks
    lab, stage = tasks.started(make_method("elr").stages()[0], tasks.digits_task(n=120))

Equal arguments give equal tasks, to the bit.
"""

import torch
import torch.nn.functional as F

from lnl_bench.data.sources import digits, from_arrays
from lnl_bench.data.task import Task, make_task, subset
from lnl_bench.engine.contract import Stage
from lnl_bench.engine.lab import Lab


def digits_task(noise: str = "symmetric:0.5", n: int = 150, trusted: int | None = None, seed=0) -> Task:
    "`n` digits with noise such as 'pair-flip:0.3', `trusted` of each class set apart; one seed draws all."
    return make_task(subset(digits(), n, seed=seed), noise, trusted_per_class=trusted, seed=seed)


def drawn_task(classes: int, n: int = 200, noise: str = "none", trusted: int | None = None) -> Task:
    "`n` images (1, 8, 8) of random pixels that show nothing, in any number of classes of equal size."
    images = torch.randint(256, (n, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    names = [f"class {c}" for c in range(classes)]
    source = from_arrays(images, torch.arange(n) % classes, names, name="drawn", labels_are_true=True)
    return make_task(source, noise, trusted_per_class=trusted, seed=0)


def one_hot(task: Task) -> Task:
    "The same task with its labels as rows (n, C) of zeros and a one, the form of soft labels."
    return task.relabel(F.one_hot(task.given, task.num_classes).float(), by="one-hot copy")


EDGES = ("2 classes", "100 classes", "no noise", "all noise", "soft labels")


def edge_task(edge: str, trusted: int | None = None) -> Task:
    "One of `EDGES`: tasks at the border of what a method has to train on."
    if edge.endswith("classes"):
        classes = int(edge.split()[0])
        return drawn_task(classes, n=4 * classes + 40, trusted=trusted)
    if edge == "soft labels": return one_hot(digits_task(trusted=trusted))
    return digits_task("none" if edge == "no noise" else "symmetric:1", trusted=trusted)


def finite(row: dict) -> bool:
    "Whether all numbers of an epoch's record are."
    return all(torch.tensor(float(value)).isfinite() for value in row.values())


def started(stage: Stage, task: Task, **options) -> tuple[Lab, Stage]:
    "A lab on the task, which gets the other options, and the stage after its `start` in that lab."
    lab = Lab(task, **options)
    stage.start(lab)
    return lab, stage
