"""How a process finds out which one of a job it is."""

import pytest

from data_pipelines.errors import InputError
from infmae_jax import train_command
from infmae_jax.tasks.finetune import EmbeddedLabels, FineTuneConfig
from infmae_jax.training.config import DistributedConfig, from_config, to_config
from infmae_jax.training.hosts import distributed

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "gpu[03-06]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip


@pytest.mark.parametrize(
    "method, environment, expected", [("slurm", SLURM, ("gpu03", 16, 9, [1])),
                                      ("open_mpi", OPEN_MPI, ("10.96.0.1", 4, 3, [1]))]
)  # fmt: skip
def test_launchers_say_who_we_are(monkeypatch, method, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (host, port), count, index, devices = distributed._place(DistributedConfig(method=method))
    assert (host, count, index, list(devices)) == expected and 1024 < port < 65535


@pytest.mark.parametrize(
    "config, message",
    [
        (DistributedConfig(method="slurm"), "distributed.method=slurm finds no such job"),
        (DistributedConfig(method="addresses"), "distributed.coordinator='' must be HOST:PORT"),
        (DistributedConfig(method="addresses", coordinator="a:0"), "HOST:PORT"),
        (DistributedConfig(method="addresses", coordinator="a:80", process_id=1), "process_id=1 must be from 0"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(InputError, match=message):
        distributed._place(config)


def test_a_wrong_method_is_named_before_missing_shards():
    config = to_config(FineTuneConfig(embedded=EmbeddedLabels(images=2)))
    config.distributed.method = "slum"
    with pytest.raises(InputError, match="distributed.method='slum' must be one of none, tpu, slurm, open_mpi, addr"):
        train_command.begin(from_config(FineTuneConfig, config))


def test_off_a_tpu_vm_the_method_tpu_is_refused_in_one_line(monkeypatch):
    def unreachable(key):
        raise ConnectionError("metadata.google.internal")

    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.get_metadata", unreachable)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    for on_a_vm in (False, True):  # the second as where the metadata server is down
        monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", on_a_vm)
        with pytest.raises(InputError, match="not on a TPU VM.*addresses"):
            distributed._place(DistributedConfig(method="tpu", timeout_seconds=1))


def test_the_source_digest_tells_other_code_apart(tmp_path, monkeypatch):
    here = distributed.source_digest()
    assert here == distributed.source_digest()
    copy = tmp_path / "infmae_jax" / "training" / "hosts" / "distributed.py"
    copy.parent.mkdir(parents=True)
    copy.write_text("changed = True\n")
    monkeypatch.setattr(distributed, "__file__", str(copy))
    assert distributed.source_digest() != here
