//! Memory that the program lends to its queues: the allocators of a parent domain, ibv_alloc_parent_domain(3).
//!
//! They are called by the thread that makes or destroys a queue, and by no other: where somebody else (a thread that polls, the
//! helper) is the last to hold a queue, the memory waits here for the thread that destroys it.

use freeflow_core::shm::{Lender, Loan, Purpose};
use freeflow_verbs_abi::*;
use std::alloc::Layout;
use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

type Alloc = unsafe extern "C" fn(*mut ibv_pd, *mut c_void, usize, usize, u64) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut ibv_pd, *mut c_void, *mut c_void, u64);

/// IBV_ALLOCATOR_USE_DEFAULT.
const USE_DEFAULT: usize = usize::MAX;

/// The functions of a parent domain and what it passes to them.
#[derive(Debug, Clone, Copy)]
pub struct Allocators {
    pub alloc: Alloc,
    pub free: Free,
    pub context: *mut c_void,
}

/// What one queue has been lent.
#[derive(Debug)]
pub struct Loans {
    pd: *mut ibv_pd,
    allocators: Allocators,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// Pieces that the queue has.
    lent: usize,
    /// Pieces that it has given back and the program has not got yet.
    back: Vec<(NonNull<u8>, Purpose)>,
}

// SAFETY: the domain and the program's context are only passed to the program's functions, by the thread that it calls from.
unsafe impl Send for Loans {}
// SAFETY: as above; all else is under a lock.
unsafe impl Sync for Loans {}

impl Loans {
    pub fn new(pd: *mut ibv_pd, allocators: Allocators) -> Arc<Self> {
        Arc::new(Self { pd, allocators, state: Mutex::default(), changed: Condvar::new() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self, memory: NonNull<u8>, purpose: Purpose) {
        let Allocators { free, context, .. } = self.allocators;
        // SAFETY: the program's own function, with memory that it gave.
        unsafe { free(self.pd, context, memory.as_ptr().cast(), purpose as u64) };
    }

    /// The queue is destroyed: waits until nobody uses its memory any more, and gives that back to the program.
    pub fn settle(&self) {
        let mut state = self.state();
        while state.lent > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let back = std::mem::take(&mut state.back);
        drop(state);
        back.into_iter().for_each(|(memory, purpose)| self.free(memory, purpose));
    }
}

// SAFETY: the program promises as much of what its function returns; its alignment is looked at.
unsafe impl Lender for Loans {
    fn lend(&self, layout: Layout, purpose: Purpose) -> Loan {
        let Allocators { alloc, context, .. } = self.allocators;
        let (size, alignment) = (layout.size(), layout.align());
        // SAFETY: the program's own function, as its man page says to call it.
        let memory = unsafe { alloc(self.pd, context, size, alignment, purpose as u64) };
        if memory.addr() == USE_DEFAULT {
            return Loan::UseHeap;
        }
        let Some(memory) = NonNull::new(memory.cast::<u8>()) else { return Loan::Refused };
        if !memory.addr().get().is_multiple_of(alignment) {
            self.free(memory, purpose);
            return Loan::Refused;
        }
        self.state().lent += 1;
        Loan::Lent(memory)
    }

    fn give_back(&self, memory: NonNull<u8>, purpose: Purpose) {
        let mut state = self.state();
        state.lent -= 1;
        state.back.push((memory, purpose));
        self.changed.notify_all();
    }
}

/// Makes a queue with what its domain lends, if that lends anything.
pub fn with_loans<T, E>(
    loans: Option<Arc<Loans>>,
    make: impl FnOnce(Option<&Arc<dyn Lender>>) -> Result<T, E>,
) -> Result<(T, Option<Arc<Loans>>), E> {
    let lender = loans.clone().map(|loans| loans as Arc<dyn Lender>);
    match make(lender.as_ref()) {
        Ok(made) => Ok((made, loans)),
        Err(error) => {
            loans.inspect(|loans| loans.settle());
            Err(error)
        }
    }
}
