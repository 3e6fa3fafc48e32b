// Registers Go's own memory and C's while goroutines allocate, the collector runs, and faults become panics.
package main

/*
#cgo LDFLAGS: -libverbs
#include <infiniband/verbs.h>
#include <stdlib.h>
*/
import "C"

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"unsafe"
)

const access = C.IBV_ACCESS_LOCAL_WRITE | C.IBV_ACCESS_REMOTE_WRITE | C.IBV_ACCESS_REMOTE_READ

type node struct {
	next  *node
	bytes []byte
}

func must(ok bool, what string) {
	if !ok {
		panic(what)
	}
}

// The runtime makes a panic of the fault; its handler was there before the library's.
func faults() (recovered bool) {
	defer func() { recovered = recover() != nil }()
	var none *node
	return none.bytes == nil
}

func churn(stop *atomic.Bool, all *sync.WaitGroup) {
	defer all.Done()
	for value := byte(1); !stop.Load(); value++ {
		var list *node
		for i := 0; i < 200; i++ {
			list = &node{list, bytes.Repeat([]byte{value}, 1+i*37)}
		}
		for at := list; at != nil; at = at.next {
			must(bytes.Count(at.bytes, []byte{value}) == len(at.bytes), "bytes changed")
		}
	}
}

// Writes to memory that is being registered, from a goroutine.
func writer(stop *atomic.Bool, all *sync.WaitGroup, shared []byte) {
	defer all.Done()
	for n := byte(0); !stop.Load(); n++ {
		for i := 0; i < len(shared); i += 4096 {
			must(shared[i] == n, "a write was lost")
			shared[i] = n + 1
		}
	}
}

func main() {
	list := C.ibv_get_device_list(nil)
	must(list != nil && *list != nil, "no device")
	pd := C.ibv_alloc_pd(C.ibv_open_device(*list))
	must(pd != nil, "no PD")
	register := func(at unsafe.Pointer, size int) *C.struct_ibv_mr {
		mr := C.ibv_reg_mr(pd, at, C.size_t(size), access)
		must(mr != nil, "ibv_reg_mr")
		return mr
	}
	var stop atomic.Bool
	var all sync.WaitGroup
	shared := make([]byte, 3<<20)
	all.Add(3)
	go churn(&stop, &all)
	go churn(&stop, &all)
	go writer(&stop, &all, shared)
	for round := 0; round < 150; round++ {
		size := 40000 + round*3001
		slice := bytes.Repeat([]byte{byte(round)}, size)
		own, whole := register(unsafe.Pointer(&slice[0]), size), register(unsafe.Pointer(&shared[0]), len(shared))
		chunk := C.malloc(C.size_t(size))
		foreign := register(chunk, size)
		if round%50 == 25 {
			maps, err := os.ReadFile("/proc/self/maps")
			must(err == nil && bytes.Contains(maps, []byte("freeflow-pd")), "nothing moved")
			must(exec.Command("true").Run() == nil, "true")
			runtime.GC()
		}
		must(faults(), "a fault did not become a panic")
		for _, mr := range []*C.struct_ibv_mr{own, whole, foreign} {
			must(C.ibv_dereg_mr(mr) == 0, "ibv_dereg_mr")
		}
		C.free(chunk)
		must(bytes.Count(slice, []byte{byte(round)}) == size, "bytes changed")
	}
	stop.Store(true)
	all.Wait()
	fmt.Println("kept working")
}
