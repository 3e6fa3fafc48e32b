//! One comm's connection: a QP with a CQ of its own, and how its end is noticed.
//!
//! Nobody waits in here. A comm that makes no progress looks up from time to time ([`Link::idle`]): has the QP failed, has
//! the peer closed, is the router still there? So a dead peer becomes an error of whatever request is tested next.

use std::sync::Arc;
use std::time::{Duration, Instant};

use freeflow_core::client::{CmId, Cq, Qp, QpInit, SendWr};
use freeflow_core::ctl::cm::{CmParams, cm_event};
use freeflow_core::exec::{Request, Target};
use freeflow_core::verbs::{
    Access, AhAttr, Gid, QpAttr, QpAttrMask as Mask, QpCaps, QpState, QpType, SendFlags, SendOp, Sge, Wc,
};

use crate::device::{Device, Style};
use crate::fault::{Fault, Result};
use crate::slots::Remote;

/// Fruitless calls between two looks at the QP.
const LOOK: u32 = 64;
/// Fruitless calls between two looks at the connection manager: a system call.
const ASK: u32 = 4096;
/// What was sent before the peer closed may still be on its way.
const LINGER: Duration = Duration::from_secs(1);
/// Without a router nobody would tell of the peer's death.
const ORPHANED: Duration = Duration::from_secs(10);
/// 4.096 us * 2^TIMEOUT * (RETRIES + 1), some nine seconds: how long a peer may be unreachable (ibv_modify_qp(3)).
const TIMEOUT: u8 = 18;
const RETRIES: u8 = 7;

/// A QP, not yet connected.
#[derive(Debug)]
pub struct Socket {
    qp: Arc<Qp>,
    cq: Arc<Cq>,
}

/// Where the other end is.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub gid: Gid,
    pub qpn: u32,
    pub memory: Remote,
}

/// A connected QP.
#[derive(Debug)]
pub struct Link {
    socket: Socket,
    /// Dropping it tells the peer that this end has closed; None: it was told.
    id: Option<CmId>,
    memory: Remote,
    /// Where completions are put.
    wcs: [Wc; 8],
    idle: u32,
    closed: Option<Instant>,
    orphaned: Option<Instant>,
    /// Goes last: the context must outlive the rest.
    device: Arc<Device>,
}

/// A WRITE to the peer.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    /// Comes back when it has ended, unless it is unsignaled.
    pub done: Option<u64>,
    pub to: Remote,
    pub from: Sge,
    pub inline: bool,
}

impl Write {
    #[inline]
    fn request(&self) -> SendWr<'_> {
        let mut flags = SendFlags::empty();
        flags.set(SendFlags::SIGNALED, self.done.is_some());
        flags.set(SendFlags::INLINE, self.inline);
        let request = Request {
            op: SendOp::Write,
            flags,
            imm: 0,
            target: Target::Memory { addr: self.to.addr, rkey: self.to.rkey },
            srqn: 0,
            sges: std::slice::from_ref(&self.from),
        };
        SendWr { wr_id: self.done.unwrap_or(u64::MAX), request }
    }
}

impl Socket {
    /// `depth` WRITEs with up to `inline` bytes of inline data.
    pub fn new(device: &Device, depth: u32, inline: u32) -> Result<Self> {
        let cq = device.context.create_cq(depth, 0, None)?;
        let caps = QpCaps {
            max_send_wr: depth,
            max_send_sge: 1,
            max_inline_data: inline,
            max_recv_wr: 0,
            max_recv_sge: 0,
        };
        let (send_cq, recv_cq) = (Arc::clone(&cq), Arc::clone(&cq));
        let init =
            QpInit { kind: QpType::Rc, send_cq, recv_cq, caps, sq_sig_all: false, receives: None, cookie: 0 };
        Ok(Socket { qp: device.pd.create_qp(init)?, cq })
    }

    /// What the other side needs to know of it.
    pub fn params(&self) -> CmParams {
        CmParams { qpn: self.qp.qpn(), retry_count: RETRIES, rnr_retry_count: 7, ..CmParams::default() }
    }

    /// RESET -> INIT -> RTR -> RTS.
    pub fn connect(self, device: &Arc<Device>, id: CmId, peer: &Peer, style: Style) -> Result<Link> {
        let ah = AhAttr {
            dgid: peer.gid,
            hop_limit: 64,
            traffic_class: u8::try_from(style.traffic_class).unwrap_or(0),
            port_num: 1,
            is_global: true,
            ..AhAttr::default()
        };
        let attr = QpAttr {
            ah,
            dest_qpn: peer.qpn,
            path_mtu: 5,
            access: Access::REMOTE_WRITE,
            port_num: 1,
            min_rnr_timer: 12,
            max_rd_atomic: 1,
            max_dest_rd_atomic: 1,
            timeout: TIMEOUT,
            retry_cnt: RETRIES,
            rnr_retry: 7,
            ..QpAttr::default()
        };
        for (state, mask) in STEPS {
            self.qp.modify(&QpAttr { qp_state: state, ..attr }, mask.union(Mask::STATE))?;
        }
        Ok(Link {
            socket: self,
            id: Some(id),
            memory: peer.memory,
            wcs: [Wc::default(); 8],
            idle: 0,
            closed: None,
            orphaned: None,
            device: Arc::clone(device),
        })
    }
}

const STEPS: [(QpState, Mask); 3] = [
    (QpState::Init, Mask::PKEY_INDEX.union(Mask::PORT).union(Mask::ACCESS_FLAGS)),
    (
        QpState::Rtr,
        Mask::AV
            .union(Mask::PATH_MTU)
            .union(Mask::DEST_QPN)
            .union(Mask::RQ_PSN)
            .union(Mask::MAX_DEST_RD_ATOMIC)
            .union(Mask::MIN_RNR_TIMER),
    ),
    (
        QpState::Rts,
        Mask::SQ_PSN
            .union(Mask::TIMEOUT)
            .union(Mask::RETRY_CNT)
            .union(Mask::RNR_RETRY)
            .union(Mask::MAX_QP_RD_ATOMIC),
    ),
];

impl Link {
    /// The memory of the peer's that was named when the connection was made, from `offset` on.
    pub fn memory(&self, offset: u64) -> Remote {
        Remote { addr: self.memory.addr.wrapping_add(offset), ..self.memory }
    }

    /// The id by which the connection was made: ESTABLISHED comes on it at the passive side.
    pub fn id(&self) -> Result<&CmId> {
        self.id.as_ref().ok_or_else(|| Fault::internal("a connection that has hung up"))
    }

    /// This end is of no use any more: the peer is not to wait for it until it is closed.
    #[cold]
    pub fn hang_up(&mut self) {
        self.id = None;
    }

    /// In this order: what the second writes is seen after what the first writes.
    #[inline]
    pub fn write<const N: usize>(&self, writes: &[Write; N]) -> Result<()> {
        let requests = writes.each_ref().map(Write::request);
        self.socket
            .qp
            .post_sends(&requests)
            .map_err(|(_, errno)| Fault::internal(format!("posting a WRITE: {errno}")))
    }

    /// Takes completions; `done` gets what each was posted with. The first that failed ends the comm.
    #[inline]
    pub fn poll(&mut self, what: &str, mut done: impl FnMut(u64)) -> Result<()> {
        loop {
            let count = self.socket.cq.poll(&mut self.wcs);
            for wc in &self.wcs[..count] {
                if wc.status != 0 {
                    return Err(Fault::of_completion(wc.status, what));
                }
                done(wc.wr_id);
            }
            if count < self.wcs.len() {
                return Ok(());
            }
        }
    }

    /// Something moved.
    #[inline]
    pub fn progressed(&mut self) {
        if self.idle != 0 {
            (self.idle, self.orphaned) = (0, None);
        }
    }

    /// Nothing moved: is the connection still there? True: now and then the caller should look at its CQ, too.
    #[inline]
    pub fn idle(&mut self) -> Result<bool> {
        self.idle = self.idle.wrapping_add(1);
        if self.idle.is_multiple_of(LOOK) { self.look().map(|()| true) } else { Ok(false) }
    }

    #[cold]
    fn look(&mut self) -> Result<()> {
        if self.socket.qp.state() == QpState::Err {
            return Err(Fault::remote("the peer is gone: its process ended or it refused a message"));
        }
        if !self.idle.is_multiple_of(ASK) {
            return Ok(());
        }
        let now = Instant::now();
        match self.id()?.next() {
            Ok(Some(event)) if event.kind == cm_event::DISCONNECTED => self.closed = Some(now),
            Ok(_) => {}
            // A router that was started again does not know the connection, but it knows the QP, and tells of deaths.
            Err(_) if self.device.context.has_router() => self.orphaned = None,
            Err(_) => drop(self.orphaned.get_or_insert(now)),
        }
        let passed = |since: Option<Instant>, limit| since.is_some_and(|since| now - since >= limit);
        if passed(self.closed, LINGER) {
            return Err(Fault::remote("the peer has closed the connection"));
        }
        if passed(self.orphaned, ORPHANED) {
            return Err(Fault::system("the router is gone, and nothing has come for ten seconds"));
        }
        Ok(())
    }
}
