//! Multicast: what a datagram to a group becomes.
//!
//! The router knows who is in a group; a sender keeps the list and a look at the tenant's word says whether it is still
//! good. A datagram is then delivered to each member like one that was sent to it, with the group in its header. Members on other
//! hosts are one entry of the list, [`crate::verbs::MULTICAST_QPN`]: the router takes one datagram for all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ctl::{AttachMcast, DetachMcast, ListMembers};
use crate::error::{Error, Result};
use crate::shm::{Mapping, PAGE, View};
use crate::sync::{AtomicU64, Ordering};
use crate::verbs::Gid;

use super::context::Context;
use super::qp::Qp;

/// Members of a group: where each is, and its number.
pub(super) type Members = Arc<[(Gid, u32)]>;

/// The groups that a context has sent to.
#[derive(Debug, Default)]
pub(super) struct Groups(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    /// Changes whenever a list may be out of date.
    word: Option<View<AtomicU64>>,
    lists: HashMap<Gid, (u64, Members)>,
}

impl Groups {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The router was restarted: its word is another.
    pub fn forget(&self) {
        *self.known() = Known::default();
    }

    /// Who gets a datagram to `mgid` now; nobody where no router is there to tell.
    pub fn members(&self, context: &Context, mgid: Gid) -> Members {
        let mut known = self.known();
        let now = known.word.as_ref().map(|word| word[0].load(Ordering::Acquire));
        if let Some((at, list)) = known.lists.get(&mgid)
            && Some(*at) == now
        {
            return Arc::clone(list);
        }
        known.ask(context, mgid).unwrap_or_else(|_| Arc::default())
    }
}

impl Known {
    fn ask(&mut self, context: &Context, mgid: Gid) -> Result<Members> {
        let (mut list, mut after, mut generation) = (vec![], 0, None);
        loop {
            let request = ListMembers { mgid: mgid.0, after, page: u32::from(self.word.is_some()) };
            let (reply, fds) = context.conn.call(&request, &[])?;
            if let Some(page) = fds.first() {
                let map = Mapping::new(page, 0, PAGE as usize, false);
                let map = map.map_err(Error::system("mmap of the multicast groups' page"))?;
                map.dont_fork();
                self.word = View::new(Arc::new(map), 0, 1);
            }
            let members = reply.members.iter().take(reply.count as usize);
            list.extend(members.map(|member| (Gid(member.gid), member.qpn)));
            let generation = *generation.get_or_insert(reply.generation);
            match list.last() {
                Some((_, last)) if reply.more != 0 => after = *last,
                _ => {
                    let list: Members = list.into();
                    self.lists.insert(mgid, (generation, Arc::clone(&list)));
                    return Ok(list);
                }
            }
        }
    }
}

impl Qp {
    /// ibv_attach_mcast(3); EEXIST where it is in the group already.
    pub fn attach_mcast(&self, mgid: Gid) -> Result<()> {
        let request = AttachMcast { qpn: self.qpn(), _pad: 0, mgid: mgid.0 };
        self.context().conn.ask(&request).map(|_| ())
    }

    /// ibv_detach_mcast(3).
    pub fn detach_mcast(&self, mgid: Gid) -> Result<()> {
        let request = DetachMcast { qpn: self.qpn(), _pad: 0, mgid: mgid.0 };
        self.context().conn.ask(&request).map(|_| ())
    }
}
