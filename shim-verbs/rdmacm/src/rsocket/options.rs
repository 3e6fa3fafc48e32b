//! Socket options and file flags: what can be set, what is said when asked.

use std::ffi::{c_int, c_long, c_void};
use std::sync::atomic::Ordering;
use std::time::Duration;

use freeflow_core::ctl::cm::cm_flags;
use libc::{socklen_t, timeval};

use super::socket::{Body, Socket, State};
use super::stream::conn::Sizes;
use super::table;
use crate::edge::{self, Errno, Result};

/// `SOL_RDMA` of rsocket.h, and its options.
const SOL_RDMA: c_int = 0x10000;
const RDMA_SQSIZE: c_int = 0;
const RDMA_RQSIZE: c_int = 1;
const RDMA_INLINE: c_int = 2;
const RDMA_IOMAPSIZE: c_int = 3;
const RDMA_ROUTE: c_int = 4;

const BUFFERS: (u32, u32) = (16 << 10, 64 << 20);
const QUEUES: (u32, u32) = (16, 4096);
const MAX_INLINE: u32 = 1024;
const MAX_MAPPINGS: u32 = 128;
/// Bytes of a `struct tcp_info` that are known here, and its state "established".
const TCP_INFO: usize = 104;
const TCP_ESTABLISHED: u8 = 1;
const TCP_CLOSE: u8 = 7;

/// What a program has set.
#[derive(Debug, Clone)]
pub struct Options {
    send_buffer: u32,
    receive_buffer: u32,
    sends: u32,
    receives: u32,
    inline: u32,
    mappings: u32,
    reuse: bool,
    keep_alive: bool,
    keep_idle: c_int,
    oob_inline: bool,
    linger: libc::linger,
    no_delay: bool,
    v6_only: bool,
    tos: c_int,
    pub send_timeout: Option<Duration>,
    pub receive_timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            send_buffer: 256 << 10,
            receive_buffer: 256 << 10,
            sends: 128,
            receives: 128,
            inline: 64,
            mappings: 0,
            reuse: false,
            keep_alive: false,
            keep_idle: 7200,
            oob_inline: false,
            linger: libc::linger { l_onoff: 0, l_linger: 0 },
            no_delay: false,
            v6_only: false,
            tos: 0,
            send_timeout: None,
            receive_timeout: None,
        }
    }
}

impl Options {
    pub fn sizes(&self) -> Sizes {
        Sizes {
            ring: self.receive_buffer,
            staging: self.send_buffer,
            sends: self.sends as u16,
            receives: self.receives as u16,
            inline: self.inline as u16,
            mappings: self.mappings as u16,
        }
    }

    /// Whether rclose gives up on bytes that are still on their way.
    pub fn drops_unsent(&self) -> bool {
        self.linger.l_onoff != 0 && self.linger.l_linger == 0
    }
}

/// A value of a setsockopt(2) call.
struct Given {
    value: *const c_void,
    len: socklen_t,
}

impl Given {
    /// The value as a `T`, which it must be large enough for.
    fn read<T: Copy>(&self) -> Result<T> {
        if self.value.is_null() || (self.len as usize) < size_of::<T>() {
            return Err(Errno::INVAL);
        }
        // SAFETY: the program's value, of at least that size.
        Ok(unsafe { self.value.cast::<T>().read_unaligned() })
    }

    fn int(&self) -> Result<c_int> {
        self.read::<c_int>()
    }

    fn is_on(&self) -> Result<bool> {
        Ok(self.int()? != 0)
    }

    /// A size, kept within what is possible.
    fn size(&self, (least, most): (u32, u32)) -> Result<u32> {
        u32::try_from(self.int()?).map(|size| size.clamp(least, most)).map_err(|_| Errno::INVAL)
    }

    /// As the kernel does, twice what was asked for.
    fn buffer(&self) -> Result<u32> {
        let asked = u32::try_from(self.int()?).map_err(|_| Errno::INVAL)?;
        Ok(asked.saturating_mul(2).clamp(BUFFERS.0, BUFFERS.1) & !4095)
    }

    fn timeout(&self) -> Result<Option<Duration>> {
        let time = self.read::<timeval>()?;
        let (seconds, micros) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_usec));
        match (seconds, micros) {
            (Ok(0), Ok(0)) => Ok(None),
            (Ok(seconds), Ok(micros)) if micros < 1_000_000 => {
                Ok(Some(Duration::new(seconds, micros * 1000)))
            }
            _ => Err(Errno::DOM),
        }
    }
}

fn set(socket: &Socket, level: c_int, name: c_int, given: &Given) -> Result<()> {
    let mut state = socket.lock()?;
    let begun = matches!(&state.body, Body::Stream(stream) if stream.has_begun());
    let mut options = state.options.clone();
    let to = &mut options;
    match (level, name) {
        (libc::SOL_SOCKET, libc::SO_REUSEADDR) => to.reuse = given.is_on()?,
        (libc::SOL_SOCKET, libc::SO_RCVBUF) => to.receive_buffer = given.buffer()?,
        (libc::SOL_SOCKET, libc::SO_SNDBUF) => to.send_buffer = given.buffer()?,
        (libc::SOL_SOCKET, libc::SO_LINGER) => to.linger = given.read()?,
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE) => to.keep_alive = given.is_on()?,
        (libc::SOL_SOCKET, libc::SO_OOBINLINE) => to.oob_inline = given.is_on()?,
        (libc::SOL_SOCKET, libc::SO_RCVTIMEO) => to.receive_timeout = given.timeout()?,
        (libc::SOL_SOCKET, libc::SO_SNDTIMEO) => to.send_timeout = given.timeout()?,
        (libc::SOL_SOCKET, libc::SO_BROADCAST | libc::SO_REUSEPORT) => drop(given.int()?),
        (libc::IPPROTO_IP, libc::IP_TOS) => to.tos = given.int()?,
        (libc::IPPROTO_TCP, libc::TCP_NODELAY) => to.no_delay = given.is_on()?,
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE) => match given.int()? {
            idle @ 1.. => to.keep_idle = idle,
            _ => return Err(Errno::INVAL),
        },
        // A reliable connection knows without asking whether its peer is there.
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT | libc::TCP_KEEPINTVL | libc::TCP_USER_TIMEOUT) => {}
        (libc::IPPROTO_TCP, libc::TCP_MAXSEG | libc::TCP_CONGESTION) => {}
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => to.v6_only = given.is_on()?,
        (SOL_RDMA, RDMA_SQSIZE..=RDMA_ROUTE) if begun => return Err(Errno::INVAL),
        (SOL_RDMA, RDMA_SQSIZE) => to.sends = given.size(QUEUES)?,
        (SOL_RDMA, RDMA_RQSIZE) => to.receives = given.size(QUEUES)?,
        (SOL_RDMA, RDMA_INLINE) => to.inline = given.size((16, MAX_INLINE))?,
        (SOL_RDMA, RDMA_IOMAPSIZE) => to.mappings = given.size((0, MAX_MAPPINGS))?,
        // There is one path between two ends.
        _ => return Err(Errno::OPNOTSUPP),
    }
    state.options = options;
    apply(&mut state)
}

/// Passes on what the cm id and the connection have to know.
fn apply(state: &mut State) -> Result<()> {
    let State { body, options, .. } = state;
    if let Body::Stream(stream) = body {
        stream.set_sizes(options.sizes());
    }
    let mut id = state.cm()?.id().state();
    id.tos = state.options.tos as u8;
    // They decide what a bind may share and covers.
    if !id.bound {
        let flags = [(state.options.reuse, cm_flags::REUSE), (state.options.v6_only, cm_flags::AF_ONLY)];
        id.flags = flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
    }
    Ok(())
}

/// A value that getsockopt(2) returns.
enum Value {
    Int(c_int),
    Bytes(Vec<u8>),
}

fn bytes_of<T: Copy>(value: &T) -> Value {
    let place = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: a plain C structure without padding (linger, timeval).
    Value::Bytes(unsafe { std::slice::from_raw_parts(place, size_of::<T>()) }.to_vec())
}

fn time_of(time: Option<Duration>) -> Value {
    let time = time.unwrap_or_default();
    bytes_of(&timeval { tv_sec: time.as_secs() as i64, tv_usec: time.subsec_micros().into() })
}

fn tcp_info(state: &State) -> Value {
    let connected = matches!(&state.body, Body::Stream(stream) if stream.is_connected());
    let mut info = vec![0; TCP_INFO];
    info[0] = if connected { TCP_ESTABLISHED } else { TCP_CLOSE };
    Value::Bytes(info)
}

fn take_error(state: &mut State) -> c_int {
    match &mut state.body {
        Body::Stream(stream) => stream.error(),
        Body::Datagram(datagram) => datagram.take_error(),
        Body::Closed => Some(Errno::BADF),
    }
    .map_or(0, Errno::raw_os_error)
}

fn get(socket: &Socket, level: c_int, name: c_int) -> Result<Value> {
    let mut state = socket.lock()?;
    let stream = matches!(state.body, Body::Stream(_));
    let error = match (level, name) {
        (libc::SOL_SOCKET, libc::SO_ERROR) => take_error(&mut state),
        _ => 0,
    };
    let options = &state.options;
    let number = |n: u32| Value::Int(n as c_int);
    let flag = |on: bool| Value::Int(on.into());
    Ok(match (level, name) {
        (libc::SOL_SOCKET, libc::SO_ERROR) => Value::Int(error),
        (libc::SOL_SOCKET, libc::SO_REUSEADDR) => flag(options.reuse),
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE) => flag(options.keep_alive),
        (libc::SOL_SOCKET, libc::SO_OOBINLINE) => flag(options.oob_inline),
        (libc::SOL_SOCKET, libc::SO_RCVBUF) => number(options.receive_buffer),
        (libc::SOL_SOCKET, libc::SO_SNDBUF) => number(options.send_buffer),
        (libc::SOL_SOCKET, libc::SO_LINGER) => bytes_of(&options.linger),
        (libc::SOL_SOCKET, libc::SO_RCVTIMEO) => time_of(options.receive_timeout),
        (libc::SOL_SOCKET, libc::SO_SNDTIMEO) => time_of(options.send_timeout),
        (libc::SOL_SOCKET, libc::SO_BROADCAST) => flag(false),
        (libc::SOL_SOCKET, libc::SO_TYPE) => {
            Value::Int(if stream { libc::SOCK_STREAM } else { libc::SOCK_DGRAM })
        }
        (libc::SOL_SOCKET, libc::SO_DOMAIN) => Value::Int(socket.domain),
        (libc::SOL_SOCKET, libc::SO_PROTOCOL) => {
            Value::Int(if stream { libc::IPPROTO_TCP } else { libc::IPPROTO_UDP })
        }
        (libc::IPPROTO_IP, libc::IP_TOS) => Value::Int(options.tos),
        (libc::IPPROTO_TCP, libc::TCP_NODELAY) => flag(options.no_delay),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE) => Value::Int(options.keep_idle),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT | libc::TCP_KEEPINTVL) => Value::Int(1),
        (libc::IPPROTO_TCP, libc::TCP_CONGESTION) => Value::Bytes(b"rdma\0".to_vec()),
        (libc::IPPROTO_TCP, libc::TCP_INFO) => tcp_info(&state),
        (libc::IPPROTO_TCP, libc::TCP_MAXSEG) => match &state.body {
            Body::Stream(stream) => Value::Int(stream.segment()),
            _ => return Err(Errno::OPNOTSUPP),
        },
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => flag(options.v6_only),
        (SOL_RDMA, RDMA_SQSIZE) => number(options.sends),
        (SOL_RDMA, RDMA_RQSIZE) => number(options.receives),
        (SOL_RDMA, RDMA_INLINE) => number(options.inline),
        (SOL_RDMA, RDMA_IOMAPSIZE) => number(options.mappings),
        _ => return Err(Errno::OPNOTSUPP),
    })
}

pub unsafe extern "C" fn rsetsockopt(
    socket: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    edge::code(|| set(&*table::find(socket)?, level, name, &Given { value, len }))
}

pub unsafe extern "C" fn rgetsockopt(
    socket: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut socklen_t,
) -> c_int {
    edge::code(|| {
        let socket = table::find(socket)?;
        if value.is_null() || len.is_null() {
            return Err(Errno::FAULT);
        }
        let int;
        let got = get(&socket, level, name)?;
        let bytes = match &got {
            Value::Bytes(bytes) => bytes.as_slice(),
            Value::Int(n) => {
                int = n.to_ne_bytes();
                &int[..]
            }
        };
        // SAFETY: the program's length.
        let room = unsafe { len.read() } as usize;
        let fits = bytes.len().min(room);
        // SAFETY: the program's buffer, of that length.
        unsafe { value.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), fits) };
        // SAFETY: the program's length.
        unsafe { len.write(fits as socklen_t) };
        Ok(())
    })
}

/// fcntl(2). Its third argument is a `long` for every command there is here, so it needs no variable list.
pub unsafe extern "C" fn rfcntl(socket: c_int, command: c_int, argument: c_long) -> c_int {
    let mut flags = 0;
    let code = edge::code(|| {
        let socket = table::find(socket)?;
        match command {
            libc::F_GETFL if socket.is_nonblocking() => flags = libc::O_RDWR | libc::O_NONBLOCK,
            libc::F_GETFL => flags = libc::O_RDWR,
            libc::F_SETFL => socket.set_nonblocking(argument as c_int & libc::O_NONBLOCK != 0),
            libc::F_GETFD => flags = socket.fd_flags.load(Ordering::Relaxed),
            libc::F_SETFD => socket.fd_flags.store(argument as c_int & libc::FD_CLOEXEC, Ordering::Relaxed),
            _ => return Err(Errno::OPNOTSUPP),
        }
        Ok(())
    });
    if code == 0 { flags } else { code }
}
