//! Handshakes and all their ends.

use super::*;
use crate::cm::connect::ANSWER_TIMEOUT;
use crate::cm::ends::{DREQ_TIMEOUT, TIME_WAIT};

#[test]
fn a_connection_is_made_and_taken_down() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let listener = w.listener(b, cm_space::TCP, any(7000), 0);
    assert_eq!(w.manager.ports(&home("t", 2)), [7000]);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    let request = w.next(b);
    assert_eq!((request.kind, request.listener), (cm_event::CONNECT_REQUEST, listener));
    assert_eq!((request.local, request.remote.addr, request.gid), (addr(2, 7000), v4(1), v4(1)));
    assert_eq!((request.params.qpn, request.params.psn), (5, 77));
    assert_eq!((request.params.responder_resources, request.params.initiator_depth), (3, 9));
    assert_eq!(request.data.len as usize, cm_data::REQUEST, "RoCE's length, filled up");
    assert!(request.data.bytes().starts_with(b"knock\0"));
    w.accept(b, request.id).unwrap();
    let response = w.next(a);
    assert_eq!((response.kind, response.id, response.params.qpn), (cm_event::CONNECT_RESPONSE, active, 6));
    assert_eq!((response.gid, response.data.len as usize), (v4(2), cm_data::REPLY));
    w.nothing(b);
    w.call(1, CmEstablish { id: active, _pad: 0 }).unwrap();
    assert_eq!(w.next(b).kind, cm_event::ESTABLISHED);

    w.call(1, disconnect(active)).unwrap();
    w.nothing(a);
    assert_eq!(
        (w.next(b).kind, w.manager.id(active).unwrap().state),
        (cm_event::DISCONNECTED, id::State::DreqSent)
    );
    w.call(2, disconnect(request.id)).unwrap();
    assert_eq!(w.next(a).kind, cm_event::DISCONNECTED);
    w.call(1, disconnect(active)).unwrap();
    w.nothing(a);
    w.pass(TIME_WAIT);
    assert_eq!((w.next(a).kind, w.next(b).kind), (cm_event::TIMEWAIT_EXIT, cm_event::TIMEWAIT_EXIT));
    assert_eq!(w.manager.deadline(), None);
}

#[test]
fn refusals_carry_their_reason() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let id = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, id).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::REJECTED, 8));
    assert_eq!(w.connect(a, id), Err(Errno::INVAL), "a rejected id does not connect again");

    w.listener(b, cm_space::TCP, any(7000), 0);
    let id = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, id).unwrap();
    let passive = w.next(b).id;
    let data = CmData::new(b"no", cm_data::REJECT).unwrap();
    assert_eq!(w.call(2, CmReject { id: passive, reason: 9, data }), Err(Errno::INVAL));
    w.call(2, CmReject { id: passive, reason: 0, data }).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status, event.data.len), (cm_event::REJECTED, 28, 148));
    assert_eq!(w.accept(b, passive), Err(Errno::INVAL));
}

#[test]
fn a_full_backlog_and_a_destroyed_request_reject() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let listener = w.listener(b, cm_space::TCP, any(7000), 1);
    let ids: Vec<u32> = (0..2).map(|_| w.routed(a, cm_space::TCP, addr(2, 7000))).collect();
    for id in &ids {
        w.connect(a, *id).unwrap();
    }
    let event = w.next(a);
    assert_eq!((event.kind, event.id, event.status), (cm_event::REJECTED, ids[1], 28));
    w.call(2, CmDestroy { id: listener }).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.id, event.status), (cm_event::REJECTED, ids[0], 28));
    w.nothing(b);
    assert!(w.manager.ports(&home("t", 2)).is_empty());
}

#[test]
fn fetched_requests_leave_the_backlog() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 1);
    for _ in 0..3 {
        let id = w.routed(a, cm_space::TCP, addr(2, 7000));
        w.connect(a, id).unwrap();
        assert_eq!(w.next(b).kind, cm_event::CONNECT_REQUEST);
        w.nothing(a);
    }
}

#[test]
fn death_is_told_to_the_other_end() {
    for step in 0..4 {
        let mut w = World::new();
        let (a, b) = pair(&mut w);
        w.listener(b, cm_space::TCP, any(7000), 0);
        let active = w.routed(a, cm_space::TCP, addr(2, 7000));
        w.connect(a, active).unwrap();
        let passive = w.next(b).id;
        if step > 1 {
            w.accept(b, passive).unwrap();
            w.next(a);
        }
        if step > 2 {
            w.call(1, CmEstablish { id: active, _pad: 0 }).unwrap();
            w.next(b);
        }
        let (dead, alive) = if step == 0 { (a, b) } else { (b, a) };
        w.input(Input::Leave { client: dead.number });
        let event = w.next(alive);
        let expected = if step == 3 { cm_event::DISCONNECTED } else { cm_event::REJECTED };
        assert_eq!(event.kind, expected, "step {step}");
        w.nothing(alive);
        if dead.number == b.number {
            assert!(w.manager.ports(&home("t", 2)).is_empty(), "listeners vanish");
        }
        if step == 3 {
            w.call(1, disconnect(active)).unwrap();
            w.pass(TIME_WAIT);
            assert_eq!(w.next(a).kind, cm_event::TIMEWAIT_EXIT);
        }
    }
}

#[test]
fn silence_ends_a_handshake() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 0);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    let passive = w.next(b).id;
    w.pass(ANSWER_TIMEOUT - Duration::from_millis(1));
    w.nothing(a);
    w.pass(Duration::from_millis(1));
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::UNREACHABLE, -Errno::TIMEDOUT.raw_os_error()));
    assert_eq!(w.next(b).kind, cm_event::REJECTED);
    assert_eq!(w.accept(b, passive), Err(Errno::INVAL));
}

#[test]
fn silence_ends_a_disconnect() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    let (active, _) = w.established(a, b);
    w.call(1, disconnect(active)).unwrap();
    w.pass(DREQ_TIMEOUT);
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::DISCONNECTED, -Errno::TIMEDOUT.raw_os_error()));
}

#[test]
fn data_before_the_word_establishes_once() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::TCP, any(7000), 0);
    let active = w.routed(a, cm_space::TCP, addr(2, 7000));
    w.connect(a, active).unwrap();
    let passive = w.next(b).id;
    w.accept(b, passive).unwrap();
    w.call(2, CmNotify { id: passive, _pad: 0 }).unwrap();
    assert_eq!(w.next(b).kind, cm_event::ESTABLISHED);
    w.call(1, CmEstablish { id: active, _pad: 0 }).unwrap();
    w.nothing(b);
}

#[test]
fn datagrams_are_looked_up() {
    let mut w = World::new();
    let (a, b) = pair(&mut w);
    w.listener(b, cm_space::UDP, any(7000), 0);
    let id = w.routed(a, cm_space::UDP, addr(2, 7001));
    w.connect(a, id).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.status), (cm_event::UNREACHABLE, 1));
    let id = w.routed(a, cm_space::UDP, addr(2, 7000));
    w.connect(a, id).unwrap();
    let passive = w.next(b).id;
    let params = CmParams { qpn: 6, qkey: 0x0123_4567, ..PARAMS };
    w.call(2, CmAccept { id: passive, params, data: CmData::default() }).unwrap();
    let event = w.next(a);
    assert_eq!((event.kind, event.params.qpn, event.params.qkey), (cm_event::ESTABLISHED, 6, 0x0123_4567));
    w.call(2, CmDestroy { id: passive }).unwrap();
    w.nothing(a);
}
