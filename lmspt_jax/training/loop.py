"""The training loop, in sections; no maths in it.

The order inside is fixed: evaluate, save (state i, data position i), next batch, step. A batch is a pure function of
(seed, global index), so the step number is the whole data position.

Several hosts run this in step: what they decide on (to stop, or that too much of the data can't be used) goes through
the exchange, so that all decide alike at the same step. Host 0 alone writes files, but for checkpoints.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from lmspt_jax import hosts
from lmspt_jax import metrics as metrics_lib
from lmspt_jax.checkpoint import Best, CheckpointStore
from lmspt_jax.config import ExperimentConfig, to_dict
from lmspt_jax.data.fault_log import FAULT_KEYS, FaultLog
from lmspt_jax.data.mixture import Mixture
from lmspt_jax.errors import Interrupted
from lmspt_jax.sharding import Placement, make_mesh, parameter_summary, parameter_table, shard_batch
from lmspt_jax.training import setup
from lmspt_jax.training.alarms import Alarms
from lmspt_jax.training.best import HELD_OUT, BestEvaluation
from lmspt_jax.training.compiled import compile_step, trace_step
from lmspt_jax.training.evaluators import Evaluators, wanted_metrics
from lmspt_jax.training.flops import count_flops
from lmspt_jax.training.frozen import Frozen
from lmspt_jax.training.held_out import evaluate, in_a_line, make_eval_step, show
from lmspt_jax.training.interruption import StopRequest
from lmspt_jax.training.meter import Goodput, Meter, peak_flops
from lmspt_jax.training.nonfinite import SkippedSteps
from lmspt_jax.training.state import Experiment
from lmspt_jax.training.step import make_train_step
from lmspt_jax.training.workdir import open_workdir


def train(config: ExperimentConfig, workdir: str | Path) -> None:
  """Trains to `train.num_steps`, or on from the newest checkpoint in `workdir`.

  Raises:
    LmsptError: anything a user can mend.
    Interrupted: this host or another was told to stop; the state is saved.
  """
  workdir = Path(workdir)
  wanted = wanted_metrics(config)
  best = BestEvaluation(config, wanted)
  open_workdir(config, workdir)
  output = workdir if hosts.is_writer() else None  # where this host writes
  with ExitStack() as cleanup:
    stop = cleanup.enter_context(StopRequest())

    # ---------------------------------------------------------------- held-out data, mesh, teacher, data
    held_out = setup.load_held_out(config)
    evaluators = Evaluators(config, wanted, held_out) if wanted else None
    mesh = make_mesh(config)
    cleanup.enter_context(jax.set_mesh(mesh))
    placement = Placement(config, mesh)
    teacher = setup.load_teacher(config, placement)
    mixture = Mixture(config.data)
    faults = FaultLog(config.data.max_fault_rate, mixture, output)
    cleanup.callback(faults.save)
    setup.check_hosts_agree(teacher, mixture, held_out)

    # ---------------------------------------------------------------- state: fresh or restored
    experiment = Experiment(config, teacher.dims)
    abstract = experiment.abstract_state()
    Frozen(config.train.freeze).check(abstract)
    shardings = placement.shardings(abstract)
    table = placement.table({**vars(abstract), 'teacher': teacher.params})
    if output:
      (output / 'parameters.txt').write_text(parameter_table(table))
      print(f'{parameter_summary(table)}\nevery array: {output / "parameters.txt"}', flush=True)
    store = cleanup.enter_context(CheckpointStore(
        workdir, keep=config.train.keep_checkpoints, alarm=hosts.fail if jax.process_count() > 1 else None))
    start = hosts.told_by_writer('start', store.latest_step)  # others may see new files late
    if start is None:
      state = setup.fresh_state(experiment, shardings, mesh, mixture)
      start = 0
    else:
      state = setup.restored_state(store, start, abstract, shardings, teacher.sha256, mixture)
      if output:
        print(f'resuming at step {start}', flush=True)

    # ---------------------------------------------------------------- the loop
    traced = trace_step(make_train_step(experiment, shardings), config, placement, abstract, shardings, teacher.params)
    train_step = compile_step(traced.lower(), config, jax.default_backend())
    heard = config.data.batch_size if evaluators else max(1, config.train.eval_audio)
    eval_step = jax.jit(make_eval_step(experiment, heard), out_shardings=NamedSharding(mesh, PartitionSpec()))
    batches = cleanup.enter_context(setup.open_batches(config, mixture, mesh, start_batch=start))
    writer = metrics_lib.MetricWriter(output, start)
    cleanup.callback(writer.close)
    last = config.train.num_steps
    # On a terminal only (None): in a log a bar would be one endless line.
    bar = cleanup.enter_context(tqdm(total=last, initial=start, unit='step', dynamic_ncols=True,
                                     disable=None if output else True))
    skipped = SkippedSteps(config, mixture, workdir, start, int(state.skipped_in_row))
    before = store.record(start) if start else {}
    best.resume(Best.of(before))
    goodput = Goodput(output, before.get('timing'))
    alarms = Alarms(config, before.get('alarms'))
    meter = Meter(config, writer, bar, skipped, alarms, flops=count_flops(traced.jaxpr).model_flops,
                  peak_flops=peak_flops(jax.devices()), goodput=goodput)

    exchange = hosts.Exchange(mesh)
    constant = {'config': to_dict(config), 'teacher_id': teacher.sha256}
    stopping = any(hosts.gather('stop', stop.reason))

    for step in range(start, last + 1):
      resumed_here = step == start and start > 0
      evaluates = held_out is not None and not resumed_here and (
          step % config.train.eval_every == 0 or step == last)
      saves = step > 0 and not resumed_here and (
          step % config.train.checkpoint_every == 0 or step == last or stopping)
      position = {'seed': config.train.seed, 'next_batch': step, 'fingerprint': mixture.fingerprint}
      if evaluates or saves or skipped.urgent:
        meter.flush()
      record = {**constant, 'data': position, 'timing': goodput.record, 'alarms': alarms.record}
      skipped.check(step, state, record)
      if evaluates:
        with meter.paused():
          found = evaluate(experiment, eval_step, state, teacher.params, held_out, mesh, evaluators)
          if output:
            show(found.samples, step, output / 'held_out' / f'step_{step:08d}', writer)
        writer.write(step, {f'{HELD_OUT}{k}': v for k, v in found.figures.items()})
        is_best = best.update(step, found.figures)
        saves = saves or is_best
        if output:
          bar.write(f'step {step} held-out: {in_a_line(found.figures)}{" (the best so far)" if is_best else ""}')
      if saves:
        faults.save()
        with meter.paused():
          store.save(step, vars(state), {**record, 'best': best.record})
          if stopping or step == last:
            store.wait()
      store.check()
      if stopping and step < last:
        why = f'{stop.reason}: ' if stop.reason else ''  # of this host, or of another one
        saved = f'saved in {workdir}' if step else 'before there was anything to save'
        raise Interrupted(f'{why}stopped at step {step}, {saved}; run the same command again to go on')
      if step == last:
        break
      with meter.waiting():
        batch = next(batches)
      exchange.send({'stop': np.bool_(stop.requested), **{key: batch[key] for key in FAULT_KEYS}})
      inputs = shard_batch({k: batch[k] for k in setup.MODEL_INPUTS}, mesh, config.data.batch_size)
      state, metrics = train_step(state, teacher.params, inputs)
      meter.add(step + 1, metrics)
      told = exchange.receive()
      stopping = bool(told.pop('stop').any())
      faults.update(hosts.whole_batch(told))
