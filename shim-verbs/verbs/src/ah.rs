//! Address handles: an address a UD send goes to. They live in this process only.

use crate::addr::{GRH_LEN, Sender, zeroed_ah_attr};
use crate::context;
use crate::convert::ah_from_c;
use crate::guard::{self, EINVAL, Result};
use crate::object::{Object, next_handle};
use crate::pd::Pd;
use freeflow_core::client;
use freeflow_verbs_abi::*;
use std::ffi::c_int;
use std::sync::Arc;

pub struct Rust {
    pub core: Arc<client::Ah>,
}

pub type Ah = Object<ibv_ah, Rust>;

/// # Safety
/// `pd` is a live PD of this library and `attr` points to attributes, as the C prototype demands.
pub unsafe extern "C" fn ibv_create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah {
    guard::pointer(|| {
        // SAFETY: the caller's promise.
        let attr = ah_from_c(unsafe { &*attr });
        // SAFETY: the caller's promise.
        let owner = unsafe { Pd::of(pd) };
        let core = owner.rust.core.create_ah(attr)?;
        owner.rust.users.add();
        // SAFETY: a field of a live C structure.
        let context = unsafe { (*pd).context };
        Ok(Ah::alloc(ibv_ah { context, pd, handle: next_handle() }, Rust { core }))
    })
}

/// # Safety
/// `ah` is a live AH of this library.
pub unsafe extern "C" fn ibv_destroy_ah(ah: *mut ibv_ah) -> c_int {
    guard::code(|| {
        // SAFETY: a field of a live C structure.
        let pd = unsafe { (*ah).pd };
        // SAFETY: the C API forbids any use after this.
        unsafe { Ah::free(ah) };
        // SAFETY: an AH keeps its PD alive.
        unsafe { Pd::of(pd) }.rust.users.sub();
        Ok(())
    })
}

/// Reads the way back out of a received datagram.
fn way_back(port_num: u8, wc: &ibv_wc, grh: Option<&[u8; GRH_LEN]>, ours: [u8; 16]) -> Result<ibv_ah_attr> {
    let mut attr =
        ibv_ah_attr { dlid: wc.slid, src_path_bits: wc.dlid_path_bits, port_num, ..zeroed_ah_attr() };
    if wc.wc_flags & IBV_WC_GRH != 0 {
        let sender = Sender::parse(grh.ok_or(EINVAL)?)?;
        if sender.destination != ours {
            return Err(EINVAL);
        }
        attr.is_global = 1;
        attr.grh = sender.route(0);
    }
    Ok(attr)
}

/// # Safety
/// All pointers are valid, as the C prototype demands.
pub unsafe extern "C" fn ibv_init_ah_from_wc(
    context: *mut ibv_context,
    port_num: u8,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    ah_attr: *mut ibv_ah_attr,
) -> c_int {
    guard::number(|| {
        // SAFETY: the caller's promise; a GRH is 40 bytes.
        let grh = unsafe { grh.cast::<[u8; GRH_LEN]>().as_ref() };
        // SAFETY: the caller's promise.
        let ours = unsafe { context::core(context) }.gid().0;
        // SAFETY: the caller's promise.
        let wc = unsafe { &*wc };
        let attr = way_back(port_num, wc, grh, ours)?;
        // SAFETY: the caller's promise.
        unsafe { ah_attr.write(attr) };
        Ok(0)
    })
}

/// # Safety
/// All pointers are valid, as the C prototype demands.
pub unsafe extern "C" fn ibv_create_ah_from_wc(
    pd: *mut ibv_pd,
    wc: *mut ibv_wc,
    grh: *mut ibv_grh,
    port_num: u8,
) -> *mut ibv_ah {
    let mut attr = zeroed_ah_attr();
    // SAFETY: a field of a live C structure.
    let context = unsafe { (*pd).context };
    // SAFETY: the caller's promise.
    if unsafe { ibv_init_ah_from_wc(context, port_num, wc, grh, &mut attr) } != 0 {
        return std::ptr::null_mut();
    }
    // SAFETY: the caller's promise.
    unsafe { ibv_create_ah(pd, &mut attr) }
}
