//! What operators see: containers, queue pairs and counters, as interfaces.md fixes them.
//!
//! States and counters come from memory that clients write: each word is read once, nonsense is shown as such.

use freeflow_core::verbs::{QpState, QpType};

use crate::admin::{PS_VERSION, Ps, PsContainer, PsPeer, PsQp};
use crate::state::{Container, Link, Qp, State, sorted};

impl State {
    /// `freeflow ps`.
    pub fn ps(&self) -> Ps {
        let containers = self.containers.values().map(|c| self.ps_container(c)).collect();
        Ps { version: PS_VERSION, containers }
    }

    /// Processes connected now.
    pub fn pids(&self, container: u32) -> Vec<u32> {
        sorted(self.clients.values().filter(|c| c.container == container).map(|c| c.pid))
    }

    fn ps_container(&self, c: &Container) -> PsContainer {
        let mut qps: Vec<_> = self.qps.iter().filter(|(_, owner, _)| owner.container == c.id).collect();
        qps.sort_by_key(|(qpn, owner, _)| (owner.client, *qpn));
        let totals = qps.iter().fold(c.ended, |sum, (qpn, _, _)| sum.plus(self.qp_counters(*qpn)));
        PsContainer {
            name: c.name.clone(),
            tenant: c.tenant.to_string(),
            vip: c.vip,
            pids: self.pids(c.id),
            mr_bytes: c.quota.used(crate::quota::Resource::MrBytes),
            qps: qps.into_iter().map(|(qpn, _, qp)| self.ps_qp(qpn, qp, c)).collect(),
            tx_bytes: totals.tx_bytes,
            rx_bytes: totals.rx_bytes,
            errors: totals.errors,
        }
    }

    fn ps_qp(&self, qpn: u32, qp: &Qp, home: &Container) -> PsQp {
        let counters = self.qp_counters(qpn);
        let reachable = qp.link == Link::Receiving || self.connected_peer(qpn).is_some();
        let peer = match qp.link {
            Link::To { qpn, gid } => Some(PsPeer { tenant: home.tenant.to_string(), vip: gid.ip(), qpn }),
            Link::None | Link::Receiving => None,
        };
        PsQp {
            qpn,
            transport: transport(qp.kind).into(),
            state: self.qp_state(qp).map_or("?", state_name).into(),
            path: if qp.far { Some("link:tcp".into()) } else { reachable.then(|| "direct".into()) },
            peer,
            traffic_class: qp.traffic_class,
            tx_bytes: counters.tx_bytes,
            rx_bytes: counters.rx_bytes,
            errors: counters.errors,
        }
    }
}

fn transport(kind: QpType) -> &'static str {
    match kind {
        QpType::Rc => "RC",
        QpType::Uc => "UC",
        QpType::Ud => "UD",
        QpType::XrcSend => "XRC_SEND",
        QpType::XrcRecv => "XRC_RECV",
    }
}

fn state_name(state: QpState) -> &'static str {
    match state {
        QpState::Reset => "RESET",
        QpState::Init => "INIT",
        QpState::Rtr => "RTR",
        QpState::Rts => "RTS",
        QpState::Sqd => "SQD",
        QpState::Sqe => "SQE",
        QpState::Err => "ERR",
    }
}
