"""Registers bytearrays while threads allocate, the collector runs and processes are started."""

import ctypes
import gc
import random
import subprocess
import sys
import threading

verbs = ctypes.CDLL("libibverbs.so.1", use_errno=True)
for name in ("ibv_get_device_list", "ibv_open_device", "ibv_alloc_pd", "ibv_reg_mr"):
    getattr(verbs, name).restype = ctypes.c_void_p
verbs.ibv_get_device_list.argtypes = [ctypes.c_void_p]
verbs.ibv_open_device.argtypes = [ctypes.c_void_p]
verbs.ibv_alloc_pd.argtypes = [ctypes.c_void_p]
verbs.ibv_reg_mr.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
verbs.ibv_dereg_mr.argtypes = [ctypes.c_void_p]
ACCESS = 1 | 2 | 4
stop = threading.Event()
failures = []


def must(result):
    if not result:
        raise OSError(ctypes.get_errno(), "a verb failed")
    return result


def churn(seed):
    numbers = random.Random(seed)
    kept = {}
    while not stop.is_set():
        size = numbers.randrange(1, 20000)
        key = numbers.randrange(200)
        kept[key] = [bytes([key]) * size, {"size": size}, [size] * 50]
        for value, (data, info, _) in list(kept.items())[:5]:
            if data.count(value) != info["size"]:
                failures.append(value)


# A verb gives the interpreter's lock away and must soon get it back.
sys.setswitchinterval(0.0002)
devices = ctypes.cast(must(verbs.ibv_get_device_list(None)), ctypes.POINTER(ctypes.c_void_p))
pd = must(verbs.ibv_alloc_pd(must(verbs.ibv_open_device(must(devices[0])))))
threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(2)]
for thread in threads:
    thread.start()
numbers, live = random.Random(5), []
for turn in range(300):
    size = numbers.randrange(1, 300_000)
    data = bytearray([turn % 256]) * size
    window = (ctypes.c_char * size).from_buffer(data)
    live.append((data, window, must(verbs.ibv_reg_mr(pd, ctypes.addressof(window), size, ACCESS)), turn % 256))
    if len(live) > 20:
        data, window, mr, value = live.pop(numbers.randrange(len(live)))
        assert data.count(value) == len(data), "bytes changed"
        assert verbs.ibv_dereg_mr(mr) == 0
        assert data.count(value) == len(data), "bytes changed on the way back"
    if turn % 50 == 25:
        with open("/proc/self/maps") as maps:
            assert "freeflow-pd" in maps.read(), "nothing moved"
        gc.collect()
        subprocess.run(["true"], check=True)
stop.set()
for thread in threads:
    thread.join()
assert not failures, failures
print("kept working")
