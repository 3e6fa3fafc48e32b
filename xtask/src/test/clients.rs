//! The client list: unmodified verbs programs that must pass between two lab containers.

/// One program, or a pair of them.
#[derive(Debug, Clone)]
pub struct Client {
    /// Command in c1; none when there is only one side.
    pub server: Option<Server>,
    /// Command in c2; `@c1` is the server's address.
    pub command: String,
    /// What must show that it worked, beside the exit status.
    pub checks: Vec<Check>,
}

#[derive(Debug, Clone)]
pub struct Server {
    pub command: String,
    /// Whether it ends by itself: then its exit status and its output count too.
    pub ends: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Check {
    /// A text in the client's output.
    Says(&'static str),
    /// A text in either side's output.
    Anywhere(&'static str),
    /// A text in neither side's output.
    NeverSays(&'static str),
    /// perftest's rows for all powers of two of this range, with no zero in them.
    Sizes(u64, u64),
}

use Check::{NeverSays, Says, Sizes};

const ALL: Check = Sizes(2, 8 << 20);
const PINGPONG: [Check; 2] = [Says("1000 iters in"), NeverSays("invalid data")];
/// rping prints each ping's text; the number is part of it.
const RPING: [Check; 2] = [Says("rdma-ping-9"), NeverSays("data mismatch")];

impl Client {
    pub fn name(&self) -> String {
        format!("client {}", self.command.replace(" @c1", ""))
    }

    pub fn alone(command: &str, checks: &[Check]) -> Self {
        Self { server: None, command: command.to_owned(), checks: checks.to_vec() }
    }

    /// A server and its client with one command line, the client's followed by the server's address.
    pub fn same(command: &str, checks: &[Check]) -> Self {
        let server = Server { command: command.to_owned(), ends: true };
        Self { server: Some(server), command: format!("{command} @c1"), checks: checks.to_vec() }
    }

    pub fn pair(server: &str, ends: bool, command: &str, checks: &[Check]) -> Self {
        let server = Server { command: server.to_owned(), ends };
        Self { server: Some(server), command: command.to_owned(), checks: checks.to_vec() }
    }
}

/// Those with a server, which may be on another host.
pub fn pairs() -> Vec<Client> {
    all().into_iter().filter(|client| client.server.is_some()).collect()
}

pub fn all() -> Vec<Client> {
    [
        devices(),
        pingpongs(),
        perftest(),
        unreliable(),
        shared_receives(),
        xrc(),
        atomics(),
        rdma_cm(),
        rsockets(),
        preloaded(),
        qperf(),
        fio(),
        multicast(),
        libfabric(),
        verbs_transports(),
    ]
    .concat()
}

fn devices() -> Vec<Client> {
    vec![
        Client::alone("ibv_devices", &[Says("ff0")]),
        Client::alone("ibv_devinfo -v", &[Says("ff0"), Says("PORT_ACTIVE"), Says("::ffff:10.77.1.2")]),
    ]
}

fn pingpongs() -> Vec<Client> {
    vec![
        Client::same("ibv_rc_pingpong", &PINGPONG),
        Client::same("ibv_rc_pingpong -g 0", &PINGPONG),
        Client::same("ibv_rc_pingpong -g 0 -e", &PINGPONG),
        Client::same("ibv_rc_pingpong -g 0 -c", &PINGPONG),
        Client::same("ibv_rc_pingpong -g 0 -c -e -s 1000000", &PINGPONG),
        Client::same("ibv_ud_pingpong -g 0", &[Says("1000 iters in")]),
    ]
}

fn perftest() -> Vec<Client> {
    let mut list = Vec::new();
    for verb in ["write", "read", "send"] {
        list.push(Client::same(&format!("ib_{verb}_bw -F -a -n 100"), &[ALL]));
        list.push(Client::same(&format!("ib_{verb}_lat -F -a -n 100"), &[ALL]));
        list.push(Client::same(&format!("ib_{verb}_bw -F -a -b -n 100"), &[ALL]));
        list.push(Client::same(&format!("ib_{verb}_bw -F -q 8 -n 1000"), &[Sizes(65536, 65536)]));
    }
    for verb in ["write", "send"] {
        list.push(Client::same(&format!("ib_{verb}_bw -F -I 64 -s 64 -n 5000"), &[Sizes(64, 64)]));
        list.push(Client::same(&format!("ib_{verb}_lat -F -I 64 -s 64 -n 1000"), &[Sizes(64, 64)]));
    }
    // perftest itself has no events for writes.
    for verb in ["read", "send"] {
        list.push(Client::same(&format!("ib_{verb}_bw -F -e -n 1000"), &[Sizes(65536, 65536)]));
        list.push(Client::same(&format!("ib_{verb}_lat -F -e -n 1000"), &[Sizes(2, 2)]));
    }
    // A receive for every datagram: perftest waits for all of them, and one that finds no receive is dropped.
    list.push(Client::same("ib_send_bw -F -c UD -s 1024 -n 1000 -r 1024", &[Sizes(1024, 1024)]));
    list.push(Client::same("ib_send_lat -F -c UD -s 1024 -n 1000", &[Sizes(1024, 1024)]));
    list
}

fn unreliable() -> Vec<Client> {
    vec![
        Client::same("ibv_uc_pingpong -g 0", &PINGPONG),
        Client::same("ib_write_bw -F -c UC -n 1000", &[Sizes(65536, 65536)]),
        Client::same("ib_write_lat -F -c UC -n 1000", &[Sizes(2, 2)]),
        // No more than the receives that perftest posts at first: what finds none is lost.
        Client::same("ib_send_bw -F -c UC -n 500", &[Sizes(65536, 65536)]),
        Client::same("ib_send_lat -F -c UC -n 1000", &[Sizes(2, 2)]),
    ]
}

fn shared_receives() -> Vec<Client> {
    vec![
        Client::same("ibv_srq_pingpong -g 0", &PINGPONG),
        Client::same("ibv_srq_pingpong -g 0 -e", &PINGPONG),
        Client::same("ib_send_bw -F --use-srq -q 4 -n 1000", &[Sizes(65536, 65536)]),
        Client::same("ib_send_lat -F --use-srq -n 1000", &[Sizes(2, 2)]),
    ]
}

/// The receiver listens on no port, so the lab starts the sender ten seconds later.
fn multicast() -> Vec<Client> {
    let receiver = "mckey -m 239.1.2.3 -b 10.77.1.1";
    let sender = "mckey -m 239.1.2.3 -b $(hostname -I) -s";
    vec![Client::pair(receiver, true, sender, &[Says("return status 0"), NeverSays("failure")])]
}

fn xrc() -> Vec<Client> {
    let mut list = vec![Client::same("ibv_xsrq_pingpong -g 0", &[Says("success")])];
    for verb in ["write", "read", "send"] {
        list.push(Client::same(&format!("ib_{verb}_bw -F -c XRC -n 1000"), &[Sizes(65536, 65536)]));
        list.push(Client::same(&format!("ib_{verb}_lat -F -c XRC -n 1000"), &[Sizes(2, 2)]));
    }
    list
}

fn libfabric() -> Vec<Client> {
    let pingpong = |options: &str, size: &'static str| {
        let command = format!("fi_pingpong {options} -I 1000");
        Client::same(&command, &[Says(size), NeverSays("error")])
    };
    vec![
        Client::alone("fi_info -p verbs", &[Says("provider: verbs"), Says("FI_EP_MSG"), Says("FI_EP_DGRAM")]),
        pingpong("-p verbs -e msg", "1m"),
        pingpong("-p 'verbs;ofi_rxm' -e rdm", "1m"),
        Client::same("fi_pingpong -p verbs -e dgram -I 1000", &[Says("4k"), NeverSays("error")]),
    ]
}

/// UCX over its own verbs transports, which look for the device's files. Nothing else is allowed: what works went that way.
fn verbs_transports() -> Vec<Client> {
    let list =
        vec![Client::alone("ucx_info -d", &[Says("Transport: rc_verbs"), Says("Transport: ud_verbs")])];
    [list, by_address(), by_rdma_cm(), below_ucp()].concat()
}

/// Connected by workers' addresses. rc_verbs knows no way to its peer by those, on any NIC: UCX's name rc_v is rc_verbs with
/// ud_verbs to connect by (`ud_verbs:aux`), and nothing else.
fn by_address() -> Vec<Client> {
    let tests = [
        "tag_lat -s 8",
        "tag_lat -s 65536",
        "tag_bw -s 65536",
        "ucp_put_lat -s 8",
        "ucp_get -s 65536",
        "ucp_fadd -s 8",
    ];
    let pair = |transport, test| {
        let ucx = format!("UCX_TLS={transport},self ucx_perftest");
        Client::pair(&ucx, true, &format!("{ucx} @c1 -t {test} -n 1000 -w 100 -f"), &[Says("1000")])
    };
    ["rc_v", "ud_verbs"].into_iter().flat_map(|tls| tests.map(|test| pair(tls, test))).collect()
}

/// Connected by rdma_cm, which needs no second transport.
fn by_rdma_cm() -> Vec<Client> {
    let pair = |transport| {
        let demo = format!("UCX_TLS={transport},self io_demo -q -d 512:262144 -p 1337");
        let client = format!("{demo} -i 100 -o read,write @c1");
        Client::pair(&demo, false, &client, &[Says("Client exit with status 'OK'")])
    };
    vec![pair("rc_verbs"), pair("ud_verbs")]
}

/// One layer below, where a test has one transport and connects it itself.
fn below_ucp() -> Vec<Client> {
    let tests = ["am_lat -s 8", "am_bw -s 4000 -D zcopy", "put_lat -s 8", "get -s 8192 -D zcopy"];
    let pair = |transport, test| {
        let ucx = format!("UCX_TLS={transport},self ucx_perftest -d ff0:1 -x {transport}");
        Client::pair(&ucx, true, &format!("{ucx} @c1 -t {test} -n 1000 -w 100 -f"), &[Says("1000")])
    };
    let datagrams = tests.iter().filter(|test| test.starts_with("am_"));
    let rc = tests.iter().map(|test| pair("rc_verbs", test));
    rc.chain(datagrams.map(|test| pair("ud_verbs", test))).collect()
}

fn atomics() -> Vec<Client> {
    let mut list = Vec::new();
    for kind in ["FETCH_AND_ADD", "CMP_AND_SWAP"] {
        list.push(Client::same(&format!("ib_atomic_bw -F -A {kind} -n 1000"), &[Sizes(8, 8)]));
        list.push(Client::same(&format!("ib_atomic_lat -F -A {kind} -n 1000"), &[Sizes(8, 8)]));
    }
    list
}

fn rdma_cm() -> Vec<Client> {
    vec![
        Client::pair("rping -s -a @c1 -v -V -C 10", true, "rping -c -a @c1 -v -V -C 10", &RPING),
        Client::pair("ucmatose", true, "ucmatose -s @c1", &[Says("return status 0")]),
        Client::pair("ucmatose -c 20 -C 5", true, "ucmatose -c 20 -C 5 -s @c1", &[Says("return status 0")]),
        Client::pair("ucmatose -m", true, "ucmatose -m -s @c1", &[Says("return status 0")]),
        Client::pair("udaddy", true, "udaddy -s @c1", &[Says("return status 0")]),
        Client::pair("udaddy -c 5 -C 20", true, "udaddy -c 5 -C 20 -s @c1", &[Says("return status 0")]),
        Client::pair("rdma_server", true, "rdma_client -s @c1", &[Says("end 0")]),
        Client::pair("rdma_xserver", true, "rdma_xclient -s @c1", &[Says("end 0")]),
        Client::pair("rdma_xserver -c x", true, "rdma_xclient -c x -s @c1", &[Says("end 0")]),
        Client::pair(
            "cmtime -c 50",
            false,
            "cmtime -c 50 -s @c1",
            &[Says("destroy      :"), NeverSays("failed")],
        ),
        Client::same("ib_write_bw -F -R -n 1000", &[Sizes(65536, 65536)]),
        Client::same("ib_write_lat -F -R -n 1000", &[Sizes(2, 2)]),
        Client::same("ib_send_bw -F -R -n 1000", &[Sizes(65536, 65536)]),
    ]
}

/// The original's own programs: `iters` shows that a round was measured.
fn rsockets() -> Vec<Client> {
    let measured = |command: &str, size: &'static str| {
        Client::pair(command, true, &format!("{command} -s @c1"), &[Says(size), NeverSays("verif")])
    };
    let datagrams = |options: &str, size: &'static str| {
        let server = format!("udpong {options} -b @c1");
        Client::pair(&server, false, &format!("udpong {options} -s @c1"), &[Says(size)])
    };
    vec![
        measured("rstream -S 64 -I 1000 -C 1 -T v", "custom    64"),
        measured("rstream -S 1000000 -I 10 -C 10 -T v", "custom    976k"),
        measured("rstream -S 100000 -I 20 -C 5 -T b", "custom    97k"),
        measured("rstream -S 100000 -I 20 -C 5 -T a", "custom    97k"),
        measured("rstream -S 4096 -I 100 -C 10 -T n", "custom    4k"),
        measured("riostream -S 64 -I 1000 -C 1 -T v", "custom    64"),
        measured("riostream -S 1000000 -I 5 -C 5 -T v", "custom    976k"),
        datagrams("-S 64 -C 100", "custom    64"),
        datagrams("-S 1000 -C 1000 -T e", "custom    1000"),
    ]
}

/// Unmodified TCP programs under Debian's librspreload.so. Each client also fails if its container's interface has seen a
/// tenth of the bytes: they did not go through shared memory then.
fn preloaded() -> Vec<Client> {
    const MIB: u32 = 200;
    let through = |command: &str| {
        let preload = "LD_PRELOAD=$LD_PRELOAD:$(echo /usr/lib/*/rsocket/librspreload.so)";
        format!("{preload} {command}")
    };
    let elsewhere = format!("awk '/eth0/ {{ exit $2 + $10 > {} }}' /proc/net/dev", (MIB << 20) / 10);
    let iperf = |options: &str| {
        let client = through(&format!("iperf3 -c @c1 -n {MIB}M {options}"));
        Client::pair(
            &through("iperf3 -s -1"),
            true,
            &format!("{client} && {elsewhere}"),
            &[Says("iperf Done."), Says("receiver")],
        )
    };
    let file =
        format!("dd if=/dev/urandom of=file bs=1M count={MIB} status=none && sha256sum file | tee sum");
    let serve = through("python3 -m http.server 8000");
    let fetch = |what: &str| through(&format!("curl -sSf http://@c1:8000/{what}"));
    let web = Client::pair(
        &format!("cd /tmp && {file} && {serve}"),
        false,
        &format!(
            "cd /tmp && {} >sum && {} >file && sha256sum -c sum && {elsewhere}",
            fetch("sum"),
            fetch("file")
        ),
        &[Says("file: OK")],
    );
    // It leaves its calls by longjmp, and must end by itself: timeout kills it otherwise.
    let interrupted = Client::pair(
        &through("iperf3 -s -1"),
        false,
        &format!("{}; test $? = 124", through("timeout -k 10 1 iperf3 -c @c1 -t 60")),
        &[Check::Anywhere("interrupt - the client has terminated")],
    );
    vec![iperf(""), iperf("-R"), iperf("-P 4"), interrupted, web]
}

fn qperf() -> Vec<Client> {
    const TESTS: [&str; 15] = [
        "rc_bi_bw",
        "rc_bw",
        "rc_lat",
        "rc_rdma_read_bw",
        "rc_rdma_read_lat",
        "rc_rdma_write_bw",
        "rc_rdma_write_lat",
        "rc_rdma_write_poll_lat",
        "rc_compare_swap_mr",
        "rc_fetch_add_mr",
        "ver_rc_compare_swap",
        "ver_rc_fetch_add",
        "ud_bi_bw",
        "ud_bw",
        "ud_lat",
    ];
    let command = |test: &str| format!("qperf @c1 -t 1 {test}");
    TESTS.iter().map(|test| Client::pair("qperf", false, &command(test), &[NeverSays("failed")])).collect()
}

fn fio() -> Vec<Client> {
    const COMMON: &str = "fio --name=x --ioengine=rdma --port=7000 --bs=64k --size=32m";
    let pair = |(verb, depth)| {
        let server = format!("{COMMON} --rw=read --iodepth={depth}");
        let client = format!("{COMMON} --rw=write --iodepth=16 --hostname=@c1 --verb={verb}");
        Client::pair(&server, false, &client, &[Says("WRITE: bw=")])
    };
    // For send the server posts a receive for every block of the file: fio asks for no RNR retries, so the first one missing ends it.
    [("write", 16), ("read", 16), ("send", 512)].map(pair).to_vec()
}
