"""baseline: train the student without the teacher, and measure what the teacher brought on the test images.

Both are the fp32 weights before export. Initial weights, order of the images and all options of training are
those of the first round's student; views are new in every epoch, as with ``--method none``.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..data.training_data import TrainingData
from ..runs.folder import StageResult
from ..runs.results import Baseline, Subject
from ..tasks.base import Outputs
from ..training.context import STUDENT, RunContext
from ..training.trainer import compute_split_logits
from ..training.weights import load_network
from .student import train

WITHOUT_TEACHER: dict[str, Any] = {
    "method": "none", "settings": {}, "weight": {}, "balance": "off", "cache_views": 0, "cache_top": None,
    "rounds": 1, "unlabeled_ratio": None,
}  # fmt: skip


def run(context: RunContext, data: TrainingData, previous: Mapping[str, Any]) -> StageResult:
    options = context.options.model_copy(update=WITHOUT_TEACHER)
    alone = replace(context, options=options)
    result = train(alone, data, previous)
    scores, outputs = [], []
    for spec in (replace(alone.student, file=STUDENT), alone.student):
        test = compute_split_logits(alone, data, spec, load_network(context.folder.path, spec), "test")
        assert test is not None
        scores.append(context.task.score(*test))
        outputs.append(Outputs(*test))
    difference = context.task.compare(*outputs)
    is_tested = scores[1].correct is not None or difference.first_alone is None
    baseline = Baseline(
        score=scores[1],
        val_score=Subject.model_validate(result.facts["student"]).val_score,
        student=scores[0],
        points=scores[0].percent - scores[1].percent,
        low=difference.low if is_tested else None,
        high=difference.high if is_tested else None,
        p=difference.p if is_tested else None,
        file=alone.student.file,
    )
    summary = f"without a teacher {scores[1].text}, with it {scores[0].text}, both fp32 in PyTorch on test"
    return StageResult(summary, result.outputs, {"baseline": baseline.model_dump(exclude_none=True)})
