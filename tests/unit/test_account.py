"""The account: what is live, what would be, and bytes that somebody else still holds."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ssdtrain_plugin.account import ActivationAccount


def test_peaks_are_the_highest_of_the_step():
    account = ActivationAccount()
    account.admit(100, 100, 1)
    account.admit(50, 0, 2)
    account.drop(100)
    account.dismiss(100)
    assert (account.live_bytes, account.would_be_bytes) == (0, 50)
    assert (account.peak_live_bytes, account.peak_would_be_bytes) == (100, 150)
    account.start_step()
    assert (account.peak_live_bytes, account.peak_would_be_bytes) == (0, 50)


def test_released_bytes_count_while_somebody_holds_the_storage():
    account, tensor = ActivationAccount(), torch.ones(25)
    account.hold(100)
    account.release(StorageWeakRef(tensor.untyped_storage()), 100)
    account.settle()
    assert account.live_bytes == 100
    del tensor
    account.settle()
    assert account.live_bytes == 0


def test_released_bytes_of_a_dead_storage_are_off_at_once():
    account = ActivationAccount()
    account.hold(8)
    reference = StorageWeakRef(torch.ones(2).untyped_storage())
    account.release(reference, 8)
    assert account.live_bytes == 0


def test_settle_looks_at_all_only_if_thorough():
    account = ActivationAccount()
    tensors = [torch.ones(1) for _ in range(50)]
    for tensor in tensors:
        account.hold(4)
        account.release(StorageWeakRef(tensor.untyped_storage()), 4)
    del tensor, tensors
    account.settle()
    assert 0 < account.live_bytes < 200
    account.settle(is_thorough=True)
    assert account.live_bytes == 0


def test_forgive_takes_off_what_lingers():
    account, tensor = ActivationAccount(), torch.ones(2)
    account.hold(8)
    account.release(StorageWeakRef(tensor.untyped_storage()), 8)
    account.forgive()
    assert account.live_bytes == 0
    del tensor
    account.settle(is_thorough=True)
    assert account.live_bytes == 0


def test_a_storage_that_is_saved_again_while_it_lingers_counts_once():
    account, tensor = ActivationAccount(), torch.ones(25)
    reference = StorageWeakRef(tensor.untyped_storage())
    for _ in range(3):  # in each micro-batch, while the user holds it
        account.admit(100, 100, reference.cdata)
        account.release(reference, 100)
        account.dismiss(100)
        account.settle()
    assert (account.live_bytes, account.peak_live_bytes) == (100, 100)
    del tensor
    account.settle()
    assert account.live_bytes == 0


def test_what_two_records_release_of_one_storage_lingers_together():
    account, tensor = ActivationAccount(), torch.ones(25)
    reference = StorageWeakRef(tensor.untyped_storage())
    account.admit(100, 100, reference.cdata)
    account.release(reference, 100)
    account.admit(0, 0, reference.cdata)  # at another version, while the first is alive
    account.release(reference, 0)
    assert account.live_bytes == 100
    account.forgive()
    assert account.live_bytes == 0
