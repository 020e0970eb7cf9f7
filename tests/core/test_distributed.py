"""How a process finds out which job it is one of."""

import pytest

from lm.core.distributed import Hosts, cluster, hosts_from, refusal

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
VARIABLES = {"LM_COORDINATOR": "a:1", "LM_NUM_PROCESSES": "4", "LM_PROCESS_ID": "3"}
CPU = {"JAX_PLATFORMS": "cpu"}


def test_flags_go_before_variables_and_variables_before_a_cluster():
    assert hosts_from({}, VARIABLES | SLURM) == Hosts("a:1", 4, 3)
    assert hosts_from({"process_id": "2"}, VARIABLES) == Hosts("a:1", 4, 2)
    flags = {"coordinator": "[::1]:99", "num_processes": "2", "process_id": "0"}
    assert hosts_from(flags | {"join_timeout": "5"}, {}) == Hosts("[::1]:99", 2, 0, 5)
    assert hosts_from({}, SLURM | {"LM_JOIN_TIMEOUT": "9"}) == Hosts("", 1, 0, 9)
    assert hosts_from({}, CPU) is None


@pytest.mark.parametrize(
    "environment, name",
    [
        (SLURM, "slurm"),
        # An interactive shell inside of an allocation of two tasks is one task by itself.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"} | CPU, ""),
        # A batch script is no step.
        ({key: SLURM[key] for key in SLURM if "STEP" not in key} | CPU, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "x"}, "ompi"),
        ({"OMPI_COMM_WORLD_SIZE": "1"} | CPU, ""),
        (CPU, ""),
        ({"TPU_SKIP_MDS_QUERY": "1"}, ""),
    ],
)
def test_clusters(environment, name):
    assert cluster(environment) == name


@pytest.mark.parametrize(
    "text, message",
    [
        ("DEADLINE_EXCEEDED: Barrier timed out", "not all 4 processes came to the coordinator at"),
        ("INVALID_ARGUMENT: Unexpected task", "started for another number of processes"),
        ("UNKNOWN: Failed to bind to a:1", "cannot listen at a:1"),
        ("anything", "process 3 of 4 could not join the others at a:1: anything"),
    ],
)
def test_refusals_have_an_address_and_a_remedy(text, message):
    assert message in refusal(Hosts("a:1", 4, 3), RuntimeError(text))
