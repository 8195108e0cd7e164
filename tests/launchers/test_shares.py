"""How a machine is dealt out to the jobs that run on it at the same time."""

import os

import pytest

from sdx_launchers.local.shares import Share, share_out, this_machine

pytestmark = pytest.mark.fast


def test_shares_are_equal_and_disjoint() -> None:
    shares = share_out([0, 4, 1, 5, 2, 6], ["0", "1", "2", "3"], 2)
    assert [share.cores for share in shares] == [(0, 4, 1), (5, 2, 6)]
    assert [share.gpus for share in shares] == [("0", "1"), ("2", "3")]
    assert share_out([0, 1, 2], [], 2) == [Share((0,), ()), Share((1,), ())]


def test_one_job_has_everything_and_is_told_nothing() -> None:
    assert share_out([0, 1], ["0"], 1) == [Share((), ())]
    assert Share((), ()).environment() == {} and Share((), ()).describe() == ""


def test_more_jobs_than_cores_take_turns() -> None:
    shares = share_out([0, 1], ["0"], 3)
    assert [share.cores for share in shares] == [(0,), (1,), (0,)]
    assert {share.gpus for share in shares} == {("0",)}


def test_what_a_job_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    share = Share((2, 3), ("GPU-5f", "1"))
    assert share.environment() == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": "GPU-5f,1"}
    said = "OMP_NUM_THREADS=2 CUDA_VISIBLE_DEVICES=GPU-5f,1 taskset -c 2,3 "
    assert share.describe() == said
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # somebody knows better
    assert "OMP_NUM_THREADS" not in share.environment()


def test_gpus_that_were_chosen_already_are_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5f")
    cores, gpus = this_machine()
    assert gpus == ["3", "GPU-5f"]
    assert set(cores) == os.sched_getaffinity(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert this_machine()[1] == []
