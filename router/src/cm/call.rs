//! Requests as they come off the wire, sorted by kind. Nothing is judged here but size and number of descriptors.

use freeflow_core::ctl::cm::*;
use freeflow_core::ctl::{Incoming, Request, SocketError};

macro_rules! calls {
    ($($name:ident($request:ident),)*) => {
        /// A request to the connection manager.
        #[derive(Debug, Clone)]
        #[allow(clippy::large_enum_variant, reason = "lives on one stack for the length of one call")]
        pub enum Call { $($name($request),)* }

        impl Call {
            /// The cm request in `message`; `None` if it is of another part of the protocol.
            pub fn parse(message: &Incoming) -> Option<Result<Self, SocketError>> {
                match message.header.kind {
                    $($request::KIND => Some(message.request::<$request>().map(Call::$name)),)*
                    _ => None,
                }
            }

            /// The kind a refusal is sent with.
            pub fn kind(&self) -> u16 {
                match self { $(Call::$name(_) => $request::KIND,)* }
            }
        }

        $(impl From<$request> for Call { fn from(request: $request) -> Self { Call::$name(request) } })*
    };
}

calls! {
    OpenChannel(CmOpenChannel),
    CloseChannel(CmCloseChannel),
    Create(CmCreate),
    Destroy(CmDestroy),
    Migrate(CmMigrate),
    Bind(CmBind),
    Listen(CmListen),
    ResolveAddr(CmResolveAddr),
    ResolveRoute(CmResolveRoute),
    Connect(CmConnect),
    Accept(CmAccept),
    Establish(CmEstablish),
    Reject(CmReject),
    Disconnect(CmDisconnect),
    Notify(CmNotify),
    NextEvent(CmNextEvent),
    Join(CmJoin),
}
