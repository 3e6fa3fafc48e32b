//! Legal transitions of a QP and the attributes each needs, as one table (IB spec vol. 1, 11.2.5.2; ibv_modify_qp(3)).

use super::{QpAttrMask as M, QpState as S, QpType};

/// What a transition demands and allows besides STATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    pub required: M,
    pub optional: M,
}

const fn m(parts: &[M]) -> M {
    let mut all = M::empty();
    let mut i = 0;
    while i < parts.len() {
        all = all.union(parts[i]);
        i += 1;
    }
    all
}

const NONE: M = M::empty();
const ALT: M = m(&[M::ALT_PATH, M::PATH_MIG_STATE]);

/// (type, from, to, required, optional); `from` None: from any state.
type Row = (QpType, Option<S>, S, M, M);

const INIT_CONN: M = m(&[M::PKEY_INDEX, M::PORT, M::ACCESS_FLAGS]);
const INIT_UD: M = m(&[M::PKEY_INDEX, M::PORT, M::QKEY]);
const RTR_UC: M = m(&[M::AV, M::PATH_MTU, M::DEST_QPN, M::RQ_PSN]);
const RTR_RC: M = m(&[RTR_UC, M::MAX_DEST_RD_ATOMIC, M::MIN_RNR_TIMER]);
const RTR_OPT: M = m(&[M::ALT_PATH, M::ACCESS_FLAGS, M::PKEY_INDEX]);
const RTS_RC: M = m(&[M::SQ_PSN, M::TIMEOUT, M::RETRY_CNT, M::RNR_RETRY, M::MAX_QP_RD_ATOMIC]);
const LIVE_RC: M = m(&[ALT, M::CUR_STATE, M::ACCESS_FLAGS, M::MIN_RNR_TIMER, M::RATE_LIMIT]);
const LIVE_UC: M = m(&[ALT, M::CUR_STATE, M::ACCESS_FLAGS, M::RATE_LIMIT]);
const SQD_RC: M = m(&[
    ALT,
    M::ACCESS_FLAGS,
    M::MIN_RNR_TIMER,
    M::RATE_LIMIT,
    M::AV,
    M::TIMEOUT,
    M::RETRY_CNT,
    M::RNR_RETRY,
    M::MAX_QP_RD_ATOMIC,
    M::MAX_DEST_RD_ATOMIC,
    M::PKEY_INDEX,
    M::PORT,
]);
const SQD_UC: M = m(&[ALT, M::ACCESS_FLAGS, M::RATE_LIMIT, M::AV, M::PKEY_INDEX]);
const SQD_UD: M = m(&[M::PKEY_INDEX, M::QKEY]);

const LIVE_UD: M = m(&[M::CUR_STATE, M::QKEY, M::RATE_LIMIT]);

use QpType::{Rc, Uc, Ud, XrcRecv, XrcSend};

#[rustfmt::skip]
const TABLE: &[Row] = &[
    (Rc, Some(S::Reset), S::Init, INIT_CONN, NONE),
    (Uc, Some(S::Reset), S::Init, INIT_CONN, NONE),
    (Ud, Some(S::Reset), S::Init, INIT_UD, NONE),
    (Rc, Some(S::Init), S::Init, NONE, INIT_CONN),
    (Uc, Some(S::Init), S::Init, NONE, INIT_CONN),
    (Ud, Some(S::Init), S::Init, NONE, INIT_UD),
    (Rc, Some(S::Init), S::Rtr, RTR_RC, RTR_OPT),
    (Uc, Some(S::Init), S::Rtr, RTR_UC, RTR_OPT),
    (Ud, Some(S::Init), S::Rtr, NONE, SQD_UD),
    (Rc, Some(S::Rtr), S::Rts, RTS_RC, LIVE_RC),
    (Uc, Some(S::Rtr), S::Rts, M::SQ_PSN, LIVE_UC),
    (Ud, Some(S::Rtr), S::Rts, M::SQ_PSN, LIVE_UD),
    (Rc, Some(S::Rts), S::Rts, NONE, LIVE_RC),
    (Uc, Some(S::Rts), S::Rts, NONE, LIVE_UC),
    (Ud, Some(S::Rts), S::Rts, NONE, LIVE_UD),
    (Rc, Some(S::Rts), S::Sqd, NONE, M::EN_SQD_ASYNC_NOTIFY),
    (Uc, Some(S::Rts), S::Sqd, NONE, M::EN_SQD_ASYNC_NOTIFY),
    (Ud, Some(S::Rts), S::Sqd, NONE, M::EN_SQD_ASYNC_NOTIFY),
    (Rc, Some(S::Sqd), S::Sqd, NONE, SQD_RC),
    (Uc, Some(S::Sqd), S::Sqd, NONE, SQD_UC),
    (Ud, Some(S::Sqd), S::Sqd, NONE, SQD_UD),
    (Rc, Some(S::Sqd), S::Rts, NONE, LIVE_RC),
    (Uc, Some(S::Sqd), S::Rts, NONE, LIVE_UC),
    (Ud, Some(S::Sqd), S::Rts, NONE, LIVE_UD),
    (Uc, Some(S::Sqe), S::Rts, NONE, LIVE_UC),
    (Ud, Some(S::Sqe), S::Rts, NONE, LIVE_UD),
    (XrcSend, Some(S::Init), S::Rtr, RTR_UC, RTR_OPT),
    (XrcRecv, Some(S::Rtr), S::Rts, m(&[M::SQ_PSN, M::TIMEOUT]), LIVE_RC),
    (Rc, None, S::Err, NONE, NONE),
    (Uc, None, S::Err, NONE, NONE),
    (Ud, None, S::Err, NONE, NONE),
    (Rc, None, S::Reset, NONE, NONE),
    (Uc, None, S::Reset, NONE, NONE),
    (Ud, None, S::Reset, NONE, NONE),
];

/// The transition `from` -> `to`, or None if it is illegal.
pub fn transition(kind: QpType, from: S, to: S) -> Option<Transition> {
    let fits = |row: &&Row, kind| row.0 == kind && row.1.is_none_or(|s| s == from) && row.2 == to;
    let find = |kind| TABLE.iter().find(|row| fits(row, kind));
    // Where XRC has no row of its own it goes by RC's.
    let row = find(kind).or_else(|| if kind == kind.counterpart() { None } else { find(Rc) })?;
    Some(Transition { required: row.3, optional: row.4 })
}

impl Transition {
    /// Are exactly the needed and allowed attributes named?
    pub fn accepts(&self, mask: M) -> bool {
        let given = mask.difference(M::STATE);
        given.contains(self.required) && self.required.union(self.optional).contains(given)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_way_up() {
        let rc = |from, to| transition(QpType::Rc, from, to);
        assert!(rc(S::Reset, S::Init).is_some_and(|t| t.accepts(INIT_CONN | M::STATE)));
        assert!(rc(S::Init, S::Rtr).is_some_and(|t| t.accepts(RTR_RC | M::STATE) && !t.accepts(RTR_UC)));
        assert!(rc(S::Reset, S::Rtr).is_none());
        assert!(rc(S::Rts, S::Init).is_none());
        assert!(rc(S::Err, S::Rts).is_none());
        assert!(rc(S::Rts, S::Reset).is_some_and(|t| !t.accepts(M::STATE | M::PORT)));
    }
}
