//! Queue memory: blocks of slabs the router made.
//!
//! A freed block is only ever used again for the same kind and size, so that a peer that still has it mapped finds a
//! header of the kind it expects, and reads in it that its QP is gone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::ctl::MakeSlab;
use crate::error::{Error, Result};
use crate::shm::{Mapping, PAGE};

use super::conn::Conn;

/// The smallest slab. Each costs a descriptor here and in the router, so they grow with what there is.
const SLAB: u64 = 256 * 1024;
/// A new slab is at least this part of all that are there.
const GROWTH: u64 = 4;
const ALIGN: u64 = 64;

/// What a block holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BlockKind {
    Qp,
    Cq,
    Srq,
    Link,
}

/// A piece of a slab.
#[derive(Debug, Clone)]
pub struct Block {
    pub map: Arc<Mapping>,
    /// The router's name of the slab.
    pub slab: u32,
    pub offset: u64,
    kind: BlockKind,
    len: u64,
}

#[derive(Debug, Default)]
struct Pool {
    free: HashMap<(BlockKind, u64), Vec<Block>>,
    /// The newest slab, its name, and where its unused rest begins.
    current: Option<(Arc<Mapping>, u32, u64)>,
    /// Bytes of all slabs.
    total: u64,
}

/// All queue memory of a context.
#[derive(Debug, Default)]
pub struct Slabs(Mutex<Pool>);

impl Slabs {
    /// A block of at least `len` bytes, zeroed unless it was used before.
    pub fn allocate(&self, conn: &Conn, kind: BlockKind, len: u64) -> Result<Block> {
        let len = len.next_multiple_of(ALIGN);
        let mut pool = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(block) = pool.free.get_mut(&(kind, len)).and_then(Vec::pop) {
            return Ok(block);
        }
        let room = pool.current.as_ref().map_or(0, |(map, _, used)| map.len() as u64 - used);
        if room < len {
            let slab = grow(conn, len.max(SLAB).max(pool.total / GROWTH).next_multiple_of(PAGE));
            // Where the quota has no room for so much, maybe for what is needed.
            let slab = slab.or_else(|_| grow(conn, len.next_multiple_of(PAGE)))?;
            pool.total += slab.0.len() as u64;
            pool.current = Some(slab);
        }
        let Some((map, slab, used)) = pool.current.as_mut() else {
            return Err(Error::NoRoom("queue memory"));
        };
        let block = Block { map: Arc::clone(map), slab: *slab, offset: *used, kind, len };
        *used += len;
        Ok(block)
    }

    /// Takes a block back.
    pub fn free(&self, block: Block) {
        let mut pool = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        pool.free.entry((block.kind, block.len)).or_default().push(block);
    }
}

fn grow(conn: &Conn, len: u64) -> Result<(Arc<Mapping>, u32, u64)> {
    let (reply, fds) = conn.call(&MakeSlab { len }, &[])?;
    let fd = fds.first().ok_or_else(|| Error::Disconnected("no memory came with MakeSlab".into()))?;
    let map = Mapping::new(fd, 0, len as usize, true).map_err(Error::system("mmap of queue memory"))?;
    map.dont_fork();
    Ok((Arc::new(map), reply.id, 0))
}
