//! Address handles: where a datagram goes, less the QP.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::verbs::AhAttr;

use super::pd::Pd;

/// An address handle. Any GID is accepted, as on a fabric: a datagram to nobody is lost.
#[derive(Debug)]
pub struct Ah {
    pub attr: AhAttr,
    _pd: Arc<Pd>,
}

impl Pd {
    /// ibv_create_ah(3): on an Ethernet link layer a global route is required.
    pub fn create_ah(self: &Arc<Self>, attr: AhAttr) -> Result<Arc<Ah>> {
        check_ah(&attr)?;
        Ok(Arc::new(Ah { attr, _pd: Arc::clone(self) }))
    }
}

/// The rules for an address vector, of an AH or a connected QP.
pub fn check_ah(attr: &AhAttr) -> Result<()> {
    match attr {
        AhAttr { is_global: false, .. } => {
            Err(Error::Invalid("an address vector needs a GRH on Ethernet (is_global = 1)"))
        }
        AhAttr { port_num: 1, sgid_index: 0, .. } => Ok(()),
        AhAttr { port_num: 1, .. } => {
            Err(Error::Invalid("the GID table has one entry: sgid_index must be 0"))
        }
        _ => Err(Error::Invalid("the device has one port: port_num must be 1")),
    }
}
