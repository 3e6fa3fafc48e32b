//! Compares our layouts with what the C compiler makes of the installed headers, and with the sizes clients rely on.

use freeflow_verbs_abi::*;
use std::io::Write;
use std::mem::{offset_of, size_of};
use std::process::{Command, Stdio};

/// A C expression and the number Rust computes for the same thing.
type Row = (&'static str, usize);

macro_rules! rows {
    ($($ty:ident { $($field:ident),* $(,)? })*) => {
        vec![$(
            (concat!("sizeof(struct ", stringify!($ty), ")"), size_of::<$ty>()),
            $((concat!("offsetof(struct ", stringify!($ty), ", ", stringify!($field), ")"), offset_of!($ty, $field)),)*
        )*]
    };
}

fn table() -> Vec<Row> {
    rows! {
        ibv_device { _ops, node_type, transport_type, name, dev_name, dev_path, ibdev_path }
        ibv_context_ops { _compat_query_port, alloc_mw, bind_mw, dealloc_mw, poll_cq, req_notify_cq, post_srq_recv, post_send, post_recv, _compat_async_event }
        ibv_context { device, ops, cmd_fd, async_fd, num_comp_vectors, mutex, abi_compat }
        verbs_context { query_port, advise_mr, modify_cq, create_cq_ex, priv_, query_device_ex, open_qp, create_qp_ex, create_srq_ex, close_xrcd, sz, context }
        ibv_pd { handle }
        ibv_mr { addr, length, handle, lkey, rkey }
        ibv_mw { rkey, handle, type_ }
        ibv_ah { pd, handle }
        ibv_comp_channel { fd, refcnt }
        ibv_cq { channel, cq_context, handle, cqe, mutex, cond, comp_events_completed, async_events_completed }
        ibv_cq_ex { comp_mask, status, wr_id, start_poll, next_poll, end_poll, read_opcode, read_imm_data, read_completion_wallclock_ns }
        ibv_srq { handle, mutex, cond, events_completed }
        ibv_qp { qp_context, pd, send_cq, recv_cq, srq, handle, qp_num, state, qp_type, mutex, cond, events_completed }
        ibv_qp_ex { comp_mask, wr_id, wr_flags, wr_atomic_cmp_swp, wr_send_tso, wr_set_sge_list, wr_start, wr_complete, wr_abort, wr_atomic_write }
        ibv_wc { wr_id, status, opcode, vendor_err, byte_len, qp_num, src_qp, wc_flags, pkey_index, slid, sl, dlid_path_bits }
        ibv_sge { addr, length, lkey }
        ibv_data_buf { addr, length }
        ibv_send_wr { wr_id, next, sg_list, num_sge, opcode, send_flags, wr, qp_type }
        ibv_recv_wr { wr_id, next, sg_list, num_sge }
        ibv_device_attr { fw_ver, node_guid, max_mr_size, vendor_id, device_cap_flags, atomic_cap, max_pkeys, phys_port_cnt }
        ibv_device_attr_ex { orig_attr, comp_mask, odp_caps, device_cap_flags_ex, tm_caps, pci_atomic_caps, phys_port_cnt_ex }
        ibv_port_attr { state, gid_tbl_len, max_msg_sz, pkey_tbl_len, lid, active_width, link_layer, flags, port_cap_flags2 }
        ibv_gid_entry { gid_index, port_num, gid_type, ndev_ifindex }
        ibv_qp_init_attr { send_cq, recv_cq, srq, cap, qp_type, sq_sig_all }
        ibv_qp_init_attr_ex { comp_mask, pd, create_flags, rwq_ind_tbl, rx_hash_conf, send_ops_flags }
        ibv_qp_attr { qp_state, path_mtu, qkey, dest_qp_num, cap, ah_attr, alt_ah_attr, pkey_index, min_rnr_timer, alt_timeout, rate_limit }
        ibv_cq_init_attr_ex { cqe, cq_context, channel, comp_vector, wc_flags, comp_mask, flags }
        ibv_ah_attr { grh, dlid, sl, static_rate, is_global, port_num }
        ibv_grh { sgid, dgid, next_hdr, hop_limit }
        ibv_async_event { element, event_type }
        ibv_sa_path_rec { sgid, pkey, preference }
        ib_user_path_rec { flow_label, preference }
        ib_uverbs_qp_attr { ah_attr, max_send_wr, alt_timeout }
        rdma_cm_id { verbs, channel, context, qp, route, ps, port_num, event, send_cq_channel, send_cq, recv_cq_channel, recv_cq, srq, pd, qp_type }
        rdma_cm_event { id, listen_id, event, status, param }
        rdma_conn_param { private_data, private_data_len, responder_resources, rnr_retry_count, srq, qp_num }
        rdma_ud_param { private_data, ah_attr, qp_num, qkey }
        rdma_addrinfo { ai_flags, ai_family, ai_src_addr, ai_route, ai_next }
        rdma_event_channel { fd }
    }
}

fn program(rows: &[Row]) -> String {
    let mut c = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <infiniband/verbs.h>\n#include <infiniband/sa.h>\n\
         #include <rdma/ib_user_sa.h>\n#include <rdma/ib_user_verbs.h>\n#include <rdma/rdma_cma.h>\nint main(void) {\n",
    );
    for (expr, _) in rows {
        // C and Rust disagree about two field names only: keywords of one or the other.
        let expr = expr.replace("type_)", "type)").replace("priv_)", "priv)");
        c.push_str(&format!("printf(\"%zu\\n\", {expr});\n"));
    }
    c + "return 0; }\n"
}

/// The numbers cc computes, or None where headers or compiler are missing.
fn compiled(rows: &[Row]) -> Option<Vec<usize>> {
    if !std::path::Path::new("/usr/include/rdma/rdma_cma.h").exists() {
        return None;
    }
    let exe = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("layout-probe");
    let mut cc = Command::new("cc").args(["-xc", "-", "-o"]).arg(&exe).stdin(Stdio::piped()).spawn().ok()?;
    cc.stdin.take()?.write_all(program(rows).as_bytes()).expect("cc reads its program");
    assert!(cc.wait().expect("cc ends").success(), "cc refused the probe");
    let out = Command::new(&exe).output().expect("the probe runs");
    let text = String::from_utf8(out.stdout).expect("numbers are ASCII");
    Some(text.lines().map(|l| l.parse().expect("a number a line")).collect())
}

#[test]
fn layouts_match_the_installed_headers() {
    let rows = table();
    let Some(c) = compiled(&rows) else {
        println!("skipped: libibverbs-dev, librdmacm-dev or cc is not installed");
        return;
    };
    assert_eq!(c.len(), rows.len());
    let wrong: Vec<_> = rows.iter().zip(&c).filter(|((_, rust), c)| rust != *c).collect();
    assert!(wrong.is_empty(), "(expression, Rust) against C: {wrong:?}");
}

/// x86-64 numbers every release since v28 shares; clients compiled long ago depend on them.
#[test]
fn sizes_clients_were_compiled_with() {
    let sizes = [
        ("ibv_device", size_of::<ibv_device>(), 664),
        ("ibv_context", size_of::<ibv_context>(), 328),
        ("verbs_context", size_of::<verbs_context>(), 648),
        ("ibv_qp", size_of::<ibv_qp>(), 160),
        ("ibv_qp_ex", size_of::<ibv_qp_ex>(), 352),
        ("ibv_cq", size_of::<ibv_cq>(), 128),
        ("ibv_cq_ex", size_of::<ibv_cq_ex>(), 288),
        ("ibv_srq", size_of::<ibv_srq>(), 128),
        ("ibv_mr", size_of::<ibv_mr>(), 48),
        ("ibv_mw", size_of::<ibv_mw>(), 32),
        ("ibv_wc", size_of::<ibv_wc>(), 48),
        ("ibv_send_wr", size_of::<ibv_send_wr>(), 128),
        ("ibv_recv_wr", size_of::<ibv_recv_wr>(), 32),
        ("ibv_device_attr", size_of::<ibv_device_attr>(), 232),
        ("ibv_device_attr_ex", size_of::<ibv_device_attr_ex>(), 400),
        ("rdma_cm_id", size_of::<rdma_cm_id>(), 416),
        ("rdma_cm_event", size_of::<rdma_cm_event>(), 80),
    ];
    for (name, ours, clients) in sizes {
        assert_eq!(ours, clients, "{name}");
    }
    let offsets = [
        ("ibv_cq_ex.status", offset_of!(ibv_cq_ex, status), 132),
        ("ibv_cq_ex.wr_id", offset_of!(ibv_cq_ex, wr_id), 136),
        ("ibv_cq_ex.start_poll", offset_of!(ibv_cq_ex, start_poll), 144),
        ("ibv_qp_ex.wr_id", offset_of!(ibv_qp_ex, wr_id), 168),
        ("ibv_qp_ex.wr_flags", offset_of!(ibv_qp_ex, wr_flags), 176),
        ("ibv_qp_ex.wr_atomic_cmp_swp", offset_of!(ibv_qp_ex, wr_atomic_cmp_swp), 184),
    ];
    for (name, ours, clients) in offsets {
        assert_eq!(ours, clients, "{name}");
    }
}
