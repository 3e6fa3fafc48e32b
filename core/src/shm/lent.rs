//! Arrays in memory that the program may lend: the allocators of parent domains, ibv_alloc_parent_domain(3).

use std::alloc::Layout;
use std::fmt::Debug;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};

/// What memory is for: the lower half of the verb's `resource_type`, whose upper half, the vendor's, is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    SendQueue = 1,
    ReceiveQueue = 2,
    SharedReceiveQueue = 3,
}

/// What became of a wish for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loan {
    Lent(NonNull<u8>),
    /// The lender has none to give; the heap is to be used.
    UseHeap,
    Refused,
}

/// Lends memory.
///
/// # Safety
/// What `lend` gives is as `layout` says, and nobody else's until it is given back.
pub unsafe trait Lender: Debug + Send + Sync {
    fn lend(&self, layout: Layout, purpose: Purpose) -> Loan;
    fn give_back(&self, memory: NonNull<u8>, purpose: Purpose);
}

/// An array on the heap, or in memory that was lent; of a length that does not change.
#[derive(Debug)]
pub struct Array<T> {
    items: NonNull<[T]>,
    /// None: they are the heap's.
    lender: Option<(Arc<dyn Lender>, Purpose)>,
}

// SAFETY: owns its items, as a Box does.
unsafe impl<T: Send> Send for Array<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Array<T> {}

impl<T: Default> Array<T> {
    /// So many default items, on the heap.
    pub fn on_heap(len: usize) -> Self {
        let items: Box<[T]> = std::iter::repeat_with(T::default).take(len).collect();
        // A Box is never null.
        let items = NonNull::from(Box::leak(items));
        Array { items, lender: None }
    }

    /// The same in memory of `lender`, or on the heap without one.
    pub fn new(len: usize, lender: Option<&Arc<dyn Lender>>, purpose: Purpose) -> Result<Self> {
        /// That of a cache line: lenders need not know of smaller ones.
        const ALIGNMENT: usize = 64;
        let Some(lender) = lender.filter(|_| len > 0) else { return Ok(Self::on_heap(len)) };
        let layout = Layout::array::<T>(len).and_then(|layout| layout.align_to(ALIGNMENT));
        let layout = layout.map_err(|_| Error::Invalid("a queue of that length has no address space"))?;
        let place = match lender.lend(layout, purpose) {
            Loan::UseHeap => return Ok(Self::on_heap(len)),
            Loan::Refused => return Err(Error::NoRoom("the parent domain's allocator gave no memory")),
            Loan::Lent(place) => place.cast::<T>(),
        };
        for index in 0..len {
            // SAFETY: within the memory that was lent for `len` items, of their alignment (Lender's promise).
            let item = unsafe { place.add(index) };
            // SAFETY: as above.
            unsafe { item.write(T::default()) };
        }
        let items = NonNull::slice_from_raw_parts(place, len);
        Ok(Array { items, lender: Some((Arc::clone(lender), purpose)) })
    }
}

impl<T: Default> Default for Array<T> {
    fn default() -> Self {
        Self::on_heap(0)
    }
}

impl<T> Deref for Array<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: initialised in new(), and this array's until it is dropped.
        unsafe { self.items.as_ref() }
    }
}

impl<T> DerefMut for Array<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above.
        unsafe { self.items.as_mut() }
    }
}

impl<T> Drop for Array<T> {
    fn drop(&mut self) {
        let Some((lender, purpose)) = &self.lender else {
            // SAFETY: what on_heap() took out of its Box.
            drop(unsafe { Box::from_raw(self.items.as_ptr()) });
            return;
        };
        // SAFETY: initialised, and nobody uses them any more.
        unsafe { self.items.drop_in_place() };
        lender.give_back(self.items.cast(), *purpose);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Lends one piece of its own, of eight words.
    #[derive(Debug, Default)]
    struct Shelf {
        words: Mutex<Box<[u128; 32]>>,
        says: Mutex<Vec<&'static str>>,
        refuses: bool,
    }

    // SAFETY: the tests borrow it once at a time, and it outlives what is lent.
    unsafe impl Lender for Shelf {
        fn lend(&self, layout: Layout, purpose: Purpose) -> Loan {
            assert_eq!((layout.align(), purpose), (64, Purpose::SendQueue));
            self.says.lock().expect("says").push("lend");
            let mut words = self.words.lock().expect("words");
            words.fill(u128::MAX);
            let place = words.as_mut_ptr().cast::<u8>();
            let aligned = place.wrapping_add(place.align_offset(64));
            if self.refuses { Loan::Refused } else { NonNull::new(aligned).map_or(Loan::Refused, Loan::Lent) }
        }

        fn give_back(&self, _: NonNull<u8>, _: Purpose) {
            self.says.lock().expect("says").push("back");
        }
    }

    #[test]
    fn lent_memory_is_filled_used_and_given_back() {
        let shelf = Arc::new(Shelf::default());
        let lender: Arc<dyn Lender> = Arc::clone(&shelf) as _;
        let mut array = Array::<u64>::new(8, Some(&lender), Purpose::SendQueue).expect("lent");
        assert_eq!(*array, [0; 8], "whatever was there");
        array[7] = 7;
        assert_eq!(array.iter().sum::<u64>(), 7);
        drop(array);
        assert!(Array::<u64>::new(0, Some(&lender), Purpose::SendQueue).expect("empty").is_empty());
        assert_eq!(*shelf.says.lock().expect("says"), ["lend", "back"]);
    }

    #[test]
    fn a_refusal_is_no_room() {
        let lender: Arc<dyn Lender> = Arc::new(Shelf { refuses: true, ..Shelf::default() });
        let refused = Array::<u64>::new(8, Some(&lender), Purpose::SendQueue).expect_err("refused");
        assert_eq!(refused.errno(), rustix::io::Errno::NOMEM);
        assert_eq!(*Array::<u64>::new(2, None, Purpose::SendQueue).expect("heap"), [0; 2]);
    }
}
