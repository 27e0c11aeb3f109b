"""One command for every job: `infmae JOB ...`, or `python -m infmae_jax JOB ...`.

    infmae pretrain --config=configs/pretrain/demo.py --workdir=RUN

Each job is a module with a command line of its own, `python -m MODULE ...`; nothing heavy is imported to list them.
"""

import difflib
import runpy
import sys
from collections.abc import Sequence

JOBS = {
    "prepare": ("data_pipelines.prepare", "folders and archives of images -> a validated shard set"),
    "build": ("data_pipelines.builders", "public data sets with labels -> shard sets"),
    "synthetic": ("data_pipelines.synthetic", "make labelled thermal scenes"),
    "inspect": ("data_pipelines.inspect", "what is in a shard set, as text and a picture"),
    "pretrain": ("infmae_jax.pretrain", "pretrain an encoder on shard sets"),
    "reconstruct": ("infmae_jax.reconstruct", "a picture of what a model reconstructs from visible patches"),
    "linear_probe": ("infmae_jax.linear_probe", "judge an encoder by a linear classifier on labelled images"),
    "finetune": ("infmae_jax.finetune", "an encoder and a head on labels: segmentation, detection, small targets"),
    "evaluate": ("infmae_jax.evaluate", "measures of a fine-tuned model on a labelled split"),
    "predict": ("infmae_jax.predict", "a fine-tuned model on images and folders without labels"),
    "embed": ("infmae_jax.embed", "features of a folder of images, as .npz or .parquet"),
    "convert": ("infmae_jax.convert", "published checkpoints to run folders, and those to .safetensors or StableHLO"),
    "report": ("infmae_jax.report", "a page about a run"),
    "compile_ahead": ("infmae_jax.compile_ahead", "memory, exchanges, estimated cost on TPUs and GPUs not here"),
    "bench": ("infmae_jax.bench", "measure speed and memory on this machine"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a job, or lists them; exit code 2 without a job or with an unknown one."""
    argv = sys.argv if argv is None else argv
    job = argv[1] if len(argv) > 1 else ""
    if job in JOBS:
        sys.argv = [f"infmae {job}", *argv[2:]]
        try:
            runpy.run_module(JOBS[job][0], run_name="__main__", alter_sys=True)
        except KeyboardInterrupt:  # while modules are imported; later `run_command` answers
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        return
    asked = job in ("-h", "--help", "help")
    if job and not asked:
        near = difflib.get_close_matches(job, JOBS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the jobs are {', '.join(JOBS)}"
        print(f"error: {job!r} is not a job; {hint}", file=sys.stderr)
        raise SystemExit(2)
    lines = ["usage: infmae JOB [--flags], and infmae JOB --help for its flags", ""]
    lines += [f"  {name:14}{line}" for name, (_, line) in JOBS.items()]
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    raise SystemExit(0 if asked else 2)


if __name__ == "__main__":
    main()
