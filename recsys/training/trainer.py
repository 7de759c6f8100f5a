"""The training loop: load, step, log, evaluate, save."""

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch

from data.batch import Batch
from data.loader import build_loader
from recsys.config import TrainConfig
from recsys.embeddings import tables_of
from recsys.models.ranking import Predictions
from recsys.sharding import shard
from recsys.training.build import Parts, mean_lengths
from recsys.training.checkpoint import Checkpointer, TrainState
from recsys.training.distributed import Ranks, diverge_seed
from recsys.training.flops import FlopCounter, bf16_peak_flops
from recsys.training.guard import FiniteGuard, NonFiniteLossError
from recsys.training.metrics import QualityMeter, TaskQuality
from recsys.training.optimizer import DenseOptimizer, Optimizers
from recsys.training.pipeline import NonFinite, build_pipeline
from recsys.training.progress import Progress, Window
from recsys.training.reporting import Reporter
from recsys.training.run_dir import RunDir
from recsys.training.summary import Summary
from recsys.training.sync_watch import SyncWatch
from recsys.training.throughput import Counts, StepTimer, peak_device_mib, peak_host_mib, percentile
from recsys.versions import environment


class Trainer:
    """One rank of a run.

    Args:
        config: the checked configuration.
        parts: model and data source, built and checked.
        ranks: the processes of the run.
        run_dir: where the run writes.
    """

    def __init__(self, config: TrainConfig, parts: Parts, ranks: Ranks, run_dir: RunDir) -> None:
        self.config, self.parts, self.ranks, self.run_dir = config, parts, ranks, run_dir
        self.device = ranks.device
        self.tasks = parts.schema.tasks
        self.flop_counter = FlopCounter(config.model, parts.task.model.interaction, parts.mask)

        self.sharded = shard(
            parts.task,
            config.sharding,
            device=self.device,
            batch_size=config.data.batch_size,
            sparse_optimizer=config.optimizer.sparse,
            mean_lengths=mean_lengths(parts.source),
            seed=config.seed,
        )
        self.model = self.sharded.model
        dense = DenseOptimizer(
            self.sharded.dense_parameters(),
            config.optimizer.dense,
            max_steps=config.trainer.max_steps,
            skip_non_finite=config.trainer.non_finite is NonFinite.skip,
        )
        self.optimizers = Optimizers(dense, self.sharded.replicated_optimizer)
        self.pipeline = build_pipeline(
            config.trainer.pipeline, config.trainer.non_finite, self.model, self.optimizers, self.device
        )
        self.checkpointer = Checkpointer(
            run_dir.checkpoints, keep=config.trainer.keep_checkpoints, process_group=ranks.host_group
        )

        self.progress = Progress()
        self.first_step = 0
        """Where this process began."""
        self.learning_rate = 0.0
        self.skipped_in_a_row = 0
        self.counts = Counts()
        """Of this rank and this process."""
        self.warm_counts = Counts()
        """The same when the steps that the summary leaves out were done."""
        self.timer = StepTimer(self.device)
        self.sync_watch = SyncWatch(config.trainer.sync_debug, self.device, config.trainer.warmup_steps)
        self.guard = FiniteGuard(ranks, self.tasks)
        self.window = Window(QualityMeter(self.tasks, self.device, ranks))
        self.reporter = Reporter(config, run_dir, ranks)
        diverge_seed(config.seed, ranks.rank)
        self.reporter.plan(self.sharded.format_plan())
        self.restore()

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train."""
        return self.progress.step >= self.config.trainer.max_steps

    def fit(self) -> Summary:
        """Train to `trainer.max_steps`; returns what was measured."""
        trainer = self.config.trainer
        self.first_step = self.progress.step
        # No more batches than steps: at the end no exchange of ids is under way that nobody waits for.
        batches = itertools.islice(self.batches("train"), trainer.max_steps - self.progress.step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.timer.interrupt()
        with (
            self.reporter.bar(self.progress.step) as bar,
            self.reporter.profiler(self.progress.step) as profiler,
            torch.autograd.set_detect_anomaly(trainer.detect_anomaly),
        ):
            while self.progress.step < trainer.max_steps:
                self.train_step(batches)
                profiler.step()
                bar.update()
                is_last = self.progress.step == trainer.max_steps
                if self.due(trainer.log_every_steps) or is_last:
                    self.log_window()
                if self.due(trainer.eval_every_steps) and not is_last:
                    self.evaluate()
                if self.due(trainer.checkpoint_every_steps):
                    self.save()
        self.reporter.say(self.sync_watch.report())
        quality = self.evaluate() if trainer.final_eval else {}
        if trainer.final_checkpoint and not self.due(trainer.checkpoint_every_steps):
            self.save()
        self.reporter.close()
        return self.summary(quality)

    def due(self, every: int | None) -> bool:
        """Whether the step just done is one of every `every` steps."""
        return every is not None and self.progress.step % every == 0

    def batches(self, split: str) -> Iterator[Batch]:
        """The batches of this rank: of `train` from where the run stands, of `eval` all."""
        loader = build_loader(
            self.parts.source,
            self.config.data,
            split=split,
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
            max_history=self.config.model.max_history,
            position=self.progress.users_consumed if split == "train" else 0,
            device_type=self.device.type,
        )
        return iter(loader)

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One step: forward, backward with the sparse updates, dense update. Nothing here waits for the device."""
        with self.sync_watch.step():
            self.learning_rate = self.optimizers.dense.set_learning_rate(self.progress.step)
            predictions: Predictions = self.pipeline.progress(batches)
            self.progress.step += 1
            self.progress.users_consumed += self.config.data.batch_size * self.ranks.world_size
            if self.pipeline.last_skipped:
                self.skipped()
            else:
                self.skipped_in_a_row = 0
                self.guard.watch(self.progress.step, predictions.loss, predictions.logits)
                self.window.add(predictions)
            self.count(predictions.batch)
            self.timer.step_done()

    def skipped(self) -> None:
        """Note a step that was left out; too many in a row mean that the model itself is lost."""
        self.progress.skipped_steps += 1
        self.skipped_in_a_row += 1
        limit = self.config.trainer.max_skipped_in_a_row
        if self.skipped_in_a_row > limit:
            raise NonFiniteLossError(
                f"the loss was not finite in {self.skipped_in_a_row} steps in a row, up to step {self.progress.step}; "
                f"trainer.max_skipped_in_a_row allows {limit}. Lower optimizer.dense.lr or optimizer.sparse.lr."
            )

    def count(self, batch: Batch) -> None:
        """Add a batch's host-side integers to the run's counts."""
        self.counts.add(batch, self.flop_counter.step(batch))
        if self.counts.steps == self.num_warmup_steps():
            self.warm_counts = replace(self.counts)
        self.progress.truncated_users += batch.num_truncated_users
        self.progress.truncated_events += batch.num_truncated_events
        self.progress.repaired_ids += batch.num_bad_ids

    def log_window(self) -> None:
        """Report loss, quality and rates since the last line; waits for the device and is a collective."""
        seconds = self.timer.collect()
        self.guard.check(self.model)
        quality = self.window.meter.compute()
        loss = float(self.ranks.mean(self.window.mean_loss()))
        rate = self.rates(self.counts.minus(self.window.counts), seconds)
        rates = {
            "samples_per_second": rate.samples,
            "tokens_per_second": rate.tokens,
            "candidates_per_second": rate.candidates,
            "lr": self.learning_rate,
        }
        self.reporter.window(self.progress.step, loss, rates, quality)
        self.window.restart(self.counts)

    @torch.no_grad()
    def evaluate(self) -> dict[str, TaskQuality]:
        """Quality on the held-out users, each seen once; between two training steps."""
        start = time.perf_counter()
        model = self.pipeline.detach()
        model.eval()
        meter = QualityMeter(self.tasks, self.device, self.ranks)
        samples = 0
        for batch in self.batches("eval"):
            _, predictions = model(batch.to(self.device, non_blocking=True))
            meter.add(predictions.logits, predictions.batch.labels, predictions.batch.true_probs)
            samples += batch.num_users
        quality = meter.compute()
        model.train()
        samples = sum(self.ranks.gather(samples))
        seconds = time.perf_counter() - start
        self.reporter.evaluation(self.progress.step, quality, seconds, samples, show=not self.is_done)
        self.timer.interrupt()
        return quality

    def save(self) -> None:
        """Write a checkpoint, unless the loss has gone astray since the last one."""
        self.guard.check(self.model)
        self.guard.check_parameters(self.sharded.dense_parameters())
        self.checkpointer.save(self.progress.step, self.state())
        self.timer.interrupt()

    def restore(self) -> None:
        """Go on from a checkpoint, if the config asks for it and there is one."""
        resume = self.config.trainer.resume
        if resume == "never":
            return
        info = self.checkpointer.restore(self.state(), path=None if resume == "auto" else Path(resume))
        if info is None:
            self.reporter.say(f"no checkpoint under {self.run_dir.checkpoints}: starting from the beginning")
            self.reporter.forget_after(0)
            return
        progress = Progress(**info.extras["progress"])
        if not self.ranks.is_main:  # rank 0 goes on counting for all
            progress = Progress(progress.step, progress.users_consumed, skipped_steps=progress.skipped_steps)
        self.progress = progress
        self.sharded.set_learning_rate(self.config.optimizer.sparse.lr)  # this run's, not the checkpoint's
        self.reporter.forget_after(progress.step)
        if info.rank_extras is not None:
            self.window.load_state_dict(info.rank_extras["window"], self.device)
        self.reporter.say(f"going on from {info.path} at step {info.step:,}")

    def state(self) -> TrainState:
        """What a checkpoint holds; a collective."""
        return TrainState(
            model=self.model,
            optimizers=self.optimizers.all(),
            users_consumed=self.progress.users_consumed,
            extras={"progress": asdict(self.progress_over_ranks())},
            rank_extras={"window": self.window.state_dict()},
        )

    def num_warmup_steps(self) -> int:
        """Steps of this process that the summary leaves out; none if that would leave nothing."""
        warmup = self.config.trainer.warmup_steps
        return warmup if self.config.trainer.max_steps - self.first_step > warmup else 0

    def rates(self, counts: Counts, seconds: float) -> Counts:
        """What all ranks counted, per second of the slowest; a collective."""
        every = self.ranks.gather((counts, seconds))
        return Counts.sum([c for c, _ in every]).per_second(max(s for _, s in every))

    def progress_over_ranks(self) -> Progress:
        """This run's progress, with what every rank counted."""
        return Progress.sum(self.ranks.gather(self.progress))

    def summary(self, quality: dict[str, TaskQuality]) -> Summary:
        """What the run measured; a collective."""
        self.timer.collect()
        times = self.timer.step_seconds[self.num_warmup_steps() :]
        rates = self.rates(self.counts.minus(self.warm_counts), sum(times))
        progress = self.progress_over_ranks()
        environ = environment()
        peak = bf16_peak_flops(environ["device"] or "") if self.device.type == "cuda" else None
        return Summary(
            name=self.config.name,
            model=self.config.model.name,
            mixer=self.config.model.mixer.value,
            attention_backend=self.parts.backend.name,
            sharding=self.config.sharding.name,
            world_size=self.ranks.world_size,
            device=environ["device"] or self.device.type,
            steps=self.progress.step,
            samples=self.progress.users_consumed,
            samples_per_second=rates.samples,
            tokens_per_second=rates.tokens,
            candidates_per_second=rates.candidates,
            step_ms_p50=1000 * percentile(times, 50),
            step_ms_p90=1000 * percentile(times, 90),
            mfu=None if peak is None else rates.flops / (peak * self.ranks.world_size),
            peak_device_mib_per_rank=self.ranks.gather(round(peak_device_mib(self.device), 1)),
            peak_host_mib_per_rank=self.ranks.gather(round(peak_host_mib(), 1)),
            table_parameters=sum(table.rows * table.dim for table in tables_of(self.model).values()),
            dense_parameters=sum(p.numel() for _, p in self.sharded.dense_parameters()),
            truncated_users=progress.truncated_users,
            truncated_events=progress.truncated_events,
            repaired_ids=progress.repaired_ids,
            skipped_steps=progress.skipped_steps,
            eval=quality,
            environment=environ,
            command=" ".join(sys.argv),
        )
