//! Address handles: where a datagram goes, less the QP.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::verbs::{AhAttr, Gid};

use super::pd::Pd;

/// An address handle. Any GID is accepted, as on a fabric: a datagram to nobody is lost.
#[derive(Debug)]
pub struct Ah {
    pub attr: AhAttr,
    _pd: Arc<Pd>,
}

impl Pd {
    /// ibv_create_ah(3)
    pub fn create_ah(self: &Arc<Self>, attr: AhAttr) -> Result<Arc<Ah>> {
        let attr = resolve_ah(attr, self.context().gid())?;
        Ok(Arc::new(Ah { attr, _pd: Arc::clone(self) }))
    }
}

/// Checks an address vector, of an AH or a connected QP, and finds the GID that a LID stands for.
pub fn resolve_ah(attr: AhAttr, own: Gid) -> Result<AhAttr> {
    match attr {
        AhAttr { port_num: 1, is_global: false, dlid, .. } => {
            let dgid = own.neighbour(dlid);
            Ok(AhAttr { dgid: dgid.ok_or(Error::Invalid("dlid must be between 1 and 0xbfff"))?, ..attr })
        }
        AhAttr { port_num: 1, sgid_index, dgid, .. } => match own.table().get(usize::from(sgid_index)) {
            Some(Some(_)) => Ok(AhAttr { dgid: dgid.canonical(), ..attr }),
            _ => Err(Error::Invalid("sgid_index must be that of a GID (ibv_query_gid_ex)")),
        },
        _ => Err(Error::Invalid("the device has one port: port_num must be 1")),
    }
}
