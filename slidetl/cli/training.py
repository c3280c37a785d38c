"""``slidetl fit``, ``find-lr``, ``validate``, ``test`` and ``predict``: LightningCLI, with our defaults."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from slidetl.cli.shipped import with_shipped_configs
from slidetl.data.augment import Augmentation
from slidetl.data.datamodule import SlideDataModule
from slidetl.data.record import (
    NO_RECORD,
    StudyRecord,
    changed_options,
    config_sha256,
    data_options,
    read_record,
)
from slidetl.errors import CheckpointError, ModelFileError, SlidetlError, UsageError
from slidetl.files import check_keys, check_writable, read_yaml
from slidetl.models.backbones import without_downloads
from slidetl.models.presets import find_preset
from slidetl.models.spec import with_preset
from slidetl.processor import postpone_collection
from slidetl.training.best import (
    BestCheckpoint,
    LastCheckpoint,
    WholeCheckpoints,
    claimed_version,
    fits,
    requeued,
)
from slidetl.training.checkpoint import (
    check_hyper_parameters,
    check_network,
    check_resumable,
    find_checkpoint,
    read_checkpoint,
)
from slidetl.training.configured import default_precision
from slidetl.training.drift import DriftReport
from slidetl.training.evaluation import SAME_FOR_ALL, better_mode, scalar_names
from slidetl.training.grader import SlideGrader
from slidetl.training.outputs import ResultFiles, SplitTable
from slidetl.training.progress import StatusReport
from slidetl.training.range_test import RangeTest, find_rate, write_range
from slidetl.training.slots import check_classes, check_import, is_under, own_error, permit
from slidetl.training.waiting import WaitingReport

_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}  # in Lightning's words
_NOT_MEASURED = "Early stopping conditioned on metric"  # Lightning's words, such as for an AUROC of one side
_NO_METRICS = ("slidetl", "pytorch_lightning")  # their callbacks measure none of the val part
_WATCHES = {
    EarlyStopping: "early_stopping",
    BestCheckpoint: "checkpoint",
    LastCheckpoint: "last_checkpoint",
}

_LINKED = {"model.grades": "data.grades", "data.tasks": "model.tasks"}  # by target
_SHIPPED = (
    "--config configs/NAME.yaml takes the file that comes with slidetl, unless there is one here. "
    "--status FILE keeps the progress in a small JSON file."
)


def run(command: str, args: list[str]) -> int:
    """Runs one of Lightning's commands, or ``find-lr``, with the options of ``fit``.

    Raises:
        UsageError: the configuration is wrong; one line says where.
    """
    _quieten()
    allow, args = _take_allow(with_shipped_configs(args))
    permit(allow)
    # Lightning starts the other processes of a DDP run by sys.argv; so the program's name stays whole there,
    # and the command is ours.
    finds = command == "find-lr"
    before, sys.argv = sys.argv, [sys.argv[0], command, *args]
    try:
        (RangeTestCLI if finds else GradingCLI)(
            "fit" if finds else command,
            [*args, f"--allow={json.dumps(allow)}"],
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": 30,
                "devices": _usual_devices(),
                "deterministic": "warn",  # a GPU lacks some operations in a deterministic form
                "use_distributed_sampler": False,  # the data module shares out whole slides
                "num_sanity_val_steps": 0,  # a slide is several steps; half a slide cannot be graded
                "log_every_n_steps": 1,
            },
            save_config_callback=SavedConfiguration if command == "fit" else None,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            parser_class=_Parser,
            parser_kwargs={
                "exit_on_error": False,
                "fit" if finds else command: {"exit_on_error": False, "epilog": _SHIPPED},
            },
        )
    except ArgumentError as error:
        check_import(error)
        raise UsageError(_one_line(str(error))) from error
    except MisconfigurationException as error:
        raise UsageError(_one_line(str(error))) from error
    except RuntimeError as error:
        if str(error).startswith(_NOT_MEASURED):
            raise UsageError(_one_line(str(error))) from error
        raise
    finally:
        sys.argv = before
    return 0


class _Parser(LightningArgumentParser):
    """Refuses in configuration files what a parser would drop without a word.

    Attributes:
        file_checkpoint: the ``ckpt_path`` of the last file that has one; not taken, as even its ``null``
            would replace a ``--ckpt_path`` that stands before the file on the command line.
    """

    file_checkpoint: str | None = None

    def parse_string(
        self, content: str, path: str | os.PathLike[str] = "", *args: Any, **kwargs: Any
    ) -> Namespace:
        """Parses a configuration, of a file or of the command line."""
        with suppress(yaml.YAMLError):  # the parser says it
            check_keys(content, path or "--config")
        found: Namespace = super().parse_string(content, path, *args, **kwargs)
        for target, source in _LINKED.items():  # no links are applied yet
            taken = found[source] if source in found else self.get_default(source)
            if target in found and list(found[target] or []) != list(taken or []):
                raise UsageError(f'{path or "--config"}: linked "{target}" must be given via "{source}"')
        self.file_checkpoint = found.pop("ckpt_path", self.file_checkpoint)
        return found


class SavedConfiguration(SaveConfigCallback):
    """Saves the configuration without the checkpoint that is resumed: a test takes the file, too."""

    def __init__(self, parser: LightningArgumentParser, config: Any, **options: Any) -> None:
        config = config.clone()
        config.ckpt_path = None
        super().__init__(parser, config, **options)


class GradingCLI(LightningCLI):
    """Links the grades, keeps the run in one folder, finds the checkpoint, and distrusts it."""

    keeps_logs = True
    _past: StudyRecord | None = None
    _resumed: dict[str, Any] | None = None

    def __init__(self, command: str, args: list[str], **options: Any) -> None:
        self._command, self._words = command, [command, *args]
        with ExitStack() as self._running, ExitStack() as self._starting:
            self._starting.enter_context(postpone_collection())
            super().__init__(SlideGrader, SlideDataModule, args=self._words, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override] # static there
        """Returns the running command only: the parsers of the others take half a second to build."""
        return {self._command: LightningCLI.subcommands()[self._command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of every run: early stopping, the best checkpoint, and names to import."""
        for target, source in _LINKED.items():
            parser.link_arguments(source, target)
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(BestCheckpoint, "checkpoint")
        # One callback for both would leave `last` at the epoch that was the best (Lightning 2.6). This one
        # comes second, so that it knows the best one's path.
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.set_defaults(
            {
                # A proper score: QWK of fifteen slides is coarse, and undefined for a single grade.
                "early_stopping.monitor": "val/rps",
                "early_stopping.mode": "min",
                # NaN is an undefined metric, or a slide that is not graded: the next epoch may do.
                "early_stopping.check_finite": False,
                "early_stopping.patience": 10,
                "checkpoint.monitor": "val/rps",
                "checkpoint.mode": "min",
                "checkpoint.filename": "best",
                "last_checkpoint.filename": "last",
                "last_checkpoint.enable_version_counter": False,
            }
        )
        parser.add_argument(
            "--allow",
            type=list[str],
            default=[],
            help="Package or class outside slidetl that a configuration or checkpoint may import, which runs "
            "its code; may be repeated, and is never taken from a file.",
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        """Adds the common option of evaluation and ``slidetl grade``."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            parser.add_argument(
                "--precision",
                type=Literal["auto", *_PRECISIONS],
                default="auto",
                help="Number format of the backbone's forward pass, as for 'slidetl grade'; auto is float32 "
                "on a CPU, and on a GPU trainer.precision, by default bfloat16 if the GPU computes in it. "
                "float32 is without TF32.",
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Sets the fields of a backbone's preset, and the precision, which the configuration then records.

        Raises:
            UsageError: a file names the checkpoint, as those of resumed fits once did.
        """
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        own = self._parser(self._command)
        assert isinstance(own, _Parser)  # as given to the command line
        if (named := own.file_checkpoint) is not None and not any(word.startswith("--ckpt") for word in args):
            instead = "start from the beginning" if self._command == "fit" else "take that of the latest fit"
            raise UsageError(
                f"a configuration file has ckpt_path {named}, maybe as the checkpoint from which "
                f"its fit was resumed; expected it on the command line: --ckpt_path {named}, or "
                f"--ckpt_path null to {instead}"
            )
        for key, value in with_preset(config.model.backbone.as_dict()).items():
            config.model.backbone[key] = value
        accelerator, precision = config.trainer.accelerator, config.trainer.precision
        usual = default_precision(accelerator, config.trainer.devices)
        wanted = _PRECISIONS.get(config.get("precision"))
        on_cpu = accelerator == "cpu" or not torch.cuda.is_available()
        if "precision" in config and on_cpu and str(precision).endswith("mixed"):
            precision = usual  # a fit on a GPU left that in its configuration
        config.trainer.precision = wanted or precision or usual

    def before_instantiate_classes(self) -> None:
        """Checks every named class before one is called."""
        config = self.config[self.config.subcommand].as_dict()
        check_classes(config, config["allow"])

    def instantiate_classes(self) -> None:
        """Builds the objects; a checkpoint's network without asking the hub."""
        try:
            offline = without_downloads(self._resumed) if self._resumed is not None else nullcontext()
            with own_error(), offline:
                super().instantiate_classes()
        except (TypeError, ValueError) as error:  # of arguments that a class refuses
            if isinstance(error, SlidetlError):
                raise
            raise UsageError(_one_line(str(error))) from error

    def before_fit(self) -> None:
        """Checks that a training can go on from its checkpoint."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            try:
                check_resumable(resumed, self.trainer)
            except CheckpointError as error:
                raise CheckpointError(f"{self.config.fit.ckpt_path}: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Takes the model from the checkpoint, once its hyper-parameters are found harmless."""
        command = self.config.subcommand
        options = self.config[command]
        allow = options.get("allow") or ()
        options["weights_only"] = True
        if command == "test":
            options["verbose"] = False  # ResultFiles prints the metrics, with the confusion matrix
        if command == "fit" and self.keeps_logs:
            options["ckpt_path"] = _path_to_resume(options)
        is_found = options.get("ckpt_path") is None
        if is_found:
            if command == "fit":
                return
            root = Path(options.trainer.default_root_dir or ".")
            if not root.is_dir():
                raise UsageError(f"no checkpoint of 'slidetl fit' below {root.absolute()}; give --ckpt_path")
            try:
                options["ckpt_path"] = str(find_checkpoint(root, allow))
            except UsageError as error:  # it ends with what to name
                raise UsageError(f"{error} by --ckpt_path") from error
            rank_zero_info(f"checkpoint: {options['ckpt_path']}")
        path = Path(options["ckpt_path"])
        checkpoint = read_checkpoint(path, allow, resumable=command == "fit")
        values, self._past = checkpoint["hyper_parameters"], read_record(checkpoint)
        by_record = command == "fit" or (command != "predict" and options.data.split_from == "checkpoint")
        if self._past is None and by_record:
            raise CheckpointError(f"{path}: {NO_RECORD}")
        check_network(path, checkpoint, allow)
        self._resumed = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        wanted = {**options.model.as_dict(), "grades": options.data.grades}
        self.config = self.parser.parse_object({command: {"model": values}}, self.config)
        found = {**self.config[command].model.as_dict(), "grades": values.get("grades")}
        # A test takes the model as it was trained, if the grades agree; a resumed fit agrees in all.
        for key in found if command == "fit" else ("grades",):
            if found[key] != wanted[key]:
                raise UsageError(
                    f"{path} was trained with {key} {found[key]}, the configuration says {wanted[key]}; "
                    "use the configuration of that training (config.yaml, where its logs are)"
                )
        if is_found:
            self._check_latest(path, found, wanted)

    def _check_latest(self, path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Refuses model options other than those of the latest fit: another one of the folder may be meant.

        Of a folder's only fit they are a warning: options of a fit may have replaced those of its file.

        Args:
            path: the checkpoint of the latest fit.
            found: its model options.
            wanted: those of the configuration.
        """
        command, then = self.config.subcommand, {key: found[key] for key in found if key != "grades"}
        # With its options as defaults, only what the user gives can differ.
        self._parser(command).set_defaults({f"model.{key}": value for key, value in then.items()})
        given = self.parser.parse_args(self._words)[command].model.as_dict()
        try:
            given["backbone"] |= with_preset(given["backbone"])
        except UsageError:  # another preset than that of the fit
            fields = find_preset(given["backbone"]["preset"]).fields
            given["backbone"] |= {"preset": "", **{key: wanted["backbone"][key] for key in fields}}
        if not (changed := changed_options(then, given, "model.")):
            return
        root = Path(self.config[command].trainer.default_root_dir or ".")
        differs = f"fit in this folder, was trained with {'; '.join(changed)}"
        if len(list(fits(root))) > 1:
            raise UsageError(
                f"{path}, of the latest {differs}; name the checkpoint of another fit by --ckpt_path, or "
                "leave these options out to take this one"
            )
        rank_zero_warn(f"{path}, of the only {differs}; the options of its training are taken")

    def after_instantiate_classes(self) -> None:
        """Hands the record of the checkpoint to the data, or the configuration's hash to be recorded."""
        self.datamodule.past = self._past
        if _is_many("WORLD_SIZE") and self.trainer.world_size == 1:
            raise UsageError(
                f"torchrun started {os.environ['WORLD_SIZE']} processes, and each would do all the work; set "
                "--trainer.devices to the processes of a machine and --trainer.num_nodes to the machines, "
                "on CPUs --trainer.strategy ddp too, or leave out torchrun"
            )
        watches: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined] # set elsewhere
        for watch in watches:
            if isinstance(watch, (EarlyStopping, ModelCheckpoint)):
                self._check_watch(watch)
        if self.subcommand == "fit":
            written = json.loads(self._parser("fit").dump(self.config.fit, skip_none=False, format="json"))
            self.datamodule.config_sha256 = config_sha256(written)
            self.datamodule.options = data_options(written)
            if self._resumed is not None:
                self._check_options()
            else:
                self.datamodule.origin = self.model.origin
                self._check_network()
        self._starting.close()

    def _check_watch(self, watch: EarlyStopping | ModelCheckpoint) -> None:
        """Refuses a monitored metric that is never measured, or whose worst value would be chosen."""
        monitor, name = watch.monitor or "", _WATCHES.get(type(watch), type(watch).__name__)
        mode = better_mode(monitor)
        if mode not in (None, watch.mode):
            higher = "higher" if mode == "max" else "lower"
            raise UsageError(f"{name}.monitor {monitor} is better when {higher}; set {name}.mode {mode}")
        if not (self.subcommand == "fit" and self.keeps_logs and monitor.startswith("val/")):
            return
        known = [f"val/{one}" for one in scalar_names(self.model.tasks.tasks, len(self.model.grades))]
        own = (type(one).__module__ for one in self.trainer.callbacks)  # type: ignore[attr-defined] # set elsewhere
        if monitor not in known and all(is_under(module, _NO_METRICS) for module in own):
            raise UsageError(f"{name}.monitor must be one of {', '.join(known)}, not {monitor}")
        if not self.trainer.limit_val_batches:
            raise UsageError(
                f"{name}.monitor {monitor} needs the validation, which trainer.limit_val_batches 0 leaves "
                "out; raise it, or monitor train/loss"
            )

    def _check_network(self) -> None:
        """Refuses a network that no checkpoint brings back, and warns of one that cannot be exported."""
        values = {key: value for key, value in self.model.hparams.items() if key != "_instantiator"}
        try:
            check_hyper_parameters(values, self.config.fit.allow)
        except CheckpointError as error:
            raise UsageError(f"no checkpoint of this training could be read: {error}") from error
        network = self.model.network
        parts = (network.aggregator, network.head)
        if all(type(part).__module__.startswith("slidetl.") for part in parts):
            return
        from slidetl.publish.export import check_scripts  # most trainings need none of it

        try:
            check_scripts(network)
        except ModelFileError as error:
            rank_zero_warn(str(error))

    def _check_options(self) -> None:
        """Refuses to resume a training with other data options or another seed."""
        then, now = self._options_then(), self.datamodule.options
        usual = asdict(Augmentation())  # 0.1.0 wrote the default out
        if now["data"]["augmentation"] is None and then.get("data", {}).get("augmentation") == usual:
            then["data"]["augmentation"] = None
        if changed := changed_options(then, now):
            raise UsageError(
                f"{self.config.fit.ckpt_path} was trained with {'; '.join(changed)}; use the configuration "
                "of that training (config.yaml, where its logs are)"
            )

    def _options_then(self) -> dict[str, Any]:
        """Returns data options and seed of the training to resume; empty, with a warning, if unknown."""
        assert self._resumed is not None
        kept = self._resumed.get("options")
        if isinstance(kept, dict):
            return kept
        # An older version kept the hash alone.
        path, sha256 = Path(self.config.fit.ckpt_path), self._past.config_sha256 if self._past else ""
        config = path.absolute().parent.parent / "config.yaml"
        with suppress(UsageError):
            values = read_yaml(config, "the configuration of a fit", "model and data")
            if isinstance(values.get("data"), dict) and config_sha256(values) == sha256:
                return data_options(values)
        if sha256:
            rank_zero_warn(
                f"{path} is of an older version, and {config} is not its configuration: nothing shows that "
                "data and seed are those of its training"
            )
        return {}

    def after_fit(self) -> None:
        """Refuses a network that no epoch could judge, or that told no slides apart; its checkpoints stay."""
        for watch in self.trainer.checkpoint_callbacks:
            if isinstance(watch, BestCheckpoint) and not watch.has_judged:
                raise UsageError(
                    f"after no epoch was {watch.monitor} a number, so the best epoch is not known; see the "
                    "warnings of slides that are not graded"
                )
        if self.model.told_apart is False:
            raise UsageError(f"after every epoch all slides of the val part {SAME_FOR_ALL}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Keeps everything of a run in ``<default_root_dir>/logs/version_N`` unless loggers are given."""
        ours: list[Callback] = [StatusReport()]
        if self.subcommand in ("test", "predict"):
            ours.append(ResultFiles())
        if self._get(self.config_init, "trainer").get("logger") is None:
            kwargs["logger"] = False
            if self.subcommand == "fit" and self.keeps_logs:
                root = self._get(self.config_init, "trainer").get("default_root_dir") or "."
                table = CSVLogger(
                    root, name="logs", version=self._running.enter_context(claimed_version(root))
                )
                board = TensorBoardLogger(root, name="logs", version=table.version, default_hp_metric=False)
                kwargs["logger"] = [table, board]
                ours += [LearningRateMonitor("epoch"), SplitTable(), DriftReport(), WaitingReport()]
        trainer = self._get(self.config_init, "trainer")
        plugins = trainer.get("plugins") or []
        kwargs["plugins"] = [WholeCheckpoints(), *(plugins if isinstance(plugins, list) else [plugins])]
        kwargs["callbacks"] = [*(trainer.get("callbacks") or []), *ours]
        try:
            return super().instantiate_trainer(**kwargs)
        except RuntimeError as error:  # of a Slurm job that Lightning refuses
            raise UsageError(_one_line(str(error))) from error


class RangeTestCLI(GradingCLI):
    """Runs a range test in the place of a fit; nothing is kept but its result."""

    keeps_logs = False

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the rates to try."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(RangeTest, "range")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes a trainer without validation, for as many epochs as it takes."""
        steps = self._get(self.config_init, "range").steps
        alone = {"max_epochs": steps, "max_steps": -1, "check_val_every_n_epoch": steps + 1}
        # Of its own: in that of a fit Lightning would go on from the checkpoint of a requeued Slurm job.
        root = Path(self._get(self.config_init, "trainer").get("default_root_dir") or ".") / "find-lr"
        return super().instantiate_trainer(**kwargs, **alone, default_root_dir=root)

    def fit(self, model: SlideGrader, datamodule: SlideDataModule, **_: Any) -> None:
        """Tests rates, writes the result, and prints the suggestion."""
        folder = Path(self.trainer.default_root_dir)
        check_writable(folder / "loss.csv")
        result = find_rate(self.trainer, model, datamodule, self._get(self.config_init, "range"))
        if not self.trainer.is_global_zero:
            return
        write_range(folder, result)
        if result.suggestion is None:
            print(f"the loss does not fall anywhere between these rates; see {folder}")
        else:
            print(f"the loss falls fastest at --model.lr {result.suggestion:.2g}; written to {folder}")


def _path_to_resume(options: Any) -> str | None:
    """Returns ``--ckpt_path``, or the checkpoint for a requeued Slurm job.

    Lightning would take the latter by itself, without a check of its configuration and data.
    """
    named: str | None = options.get("ckpt_path")
    left = requeued(Path(options.trainer.default_root_dir or ".")) if SLURMEnvironment.detect() else []
    if left and named is not None:
        is_restart = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
        is_newer = Path(named).is_file() and left[-1].stat().st_mtime > Path(named).stat().st_mtime
        left = left if is_restart and is_newer else []
    if not left:
        return named
    rank_zero_info(f"going on from {left[-1]}, left by a requeued job; remove it to start from the beginning")
    return str(left[-1])


def _usual_devices() -> int | str:
    """Returns 1, or ``auto`` in one of several processes that srun or torchrun started, for one device each.

    Lightning's auto takes every GPU of the machine, and so changes the slides per step and the result.
    """
    return "auto" if any(map(_is_many, ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE"))) else 1


def _is_many(name: str) -> bool:
    """Tells if a variable of srun or torchrun counts several processes."""
    return os.environ.get(name, "") not in ("", "1")


def _take_allow(args: list[str]) -> tuple[list[str], list[str]]:
    """Takes ``--allow`` out of the words of a command: it overrides any in a file."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--allow", action="append", default=[])
    found, rest = parser.parse_known_args(args)
    return [name for text in found.allow for name in re.findall(r"[^\s,\[\]\"']+", text)], rest


def _one_line(message: str) -> str:
    """Shortens a parser's message to its first and last line: the cause follows pages of context."""
    lines = [line.strip(" -:") for line in message.splitlines() if line.strip(" -:")]
    lines = [line for line in lines if not line.startswith("Expected a path")]  # never the cause
    return " ".join(lines[:4]) if len(lines) <= 4 else f"{lines[0]} ... {lines[-1]}"


def _quieten() -> None:
    """Silences messages beyond the user's control."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: "Tip" not in record.getMessage()
    )
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # they are about LightningCLI's code
    warnings.filterwarnings("ignore", "LightningCLI's args parameter is intended to run from within Python")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", "It is recommended to use .*sync_dist=True")  # the metrics are of all
    warnings.filterwarnings("ignore", ".*Experiment logs directory.*exists and is not empty.*")
    warnings.filterwarnings("ignore", "predict returned None")
    warnings.filterwarnings("ignore", ".*The dirpath has changed.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", ".*number of training batches.*is smaller than the logging interval.*")
