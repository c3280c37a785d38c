"""Transfer learning that grades gigapixel histology slides.

The package reads downwards as one story; imports run one way, towards the ground::

    slides/        read anything at a physical spacing
    synthetic/     draw lung sections and cohorts whose grade is known
    tiles/         grid, tissue, quality -> plan -> cut -> store; features; ledger
    evaluation/    metrics, intervals, tests, folds, calibration, sets, agreement
    analysis/      representation similarity, novelty
    library/       model cards, what is trusted, local files
    data/          from a study (manifest, ledger, cache) to batches
    models/        tile -> embedding -> slide -> grade, as plain modules
    training/      LightningModule, schedules, checkpoints, embeddings
    compare/       arms on the same folds: jobs, records, report/
    publish/       export (TorchScript, ONNX), evidence, model library
    grading/       model file + slide -> grade, map, report/
    cli/           the same from the command line

Importing the package imports nothing heavy; each part is imported where it is used.
"""

__version__ = "0.1.0"
