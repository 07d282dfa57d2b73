//! The slot's network: user-mode networking from outside, prohibited routes inside (shell).
//!
//! `slirp4netns` runs in the host's network namespace as the agent's user and answers for the slot's
//! interface. Its `--disable-host-loopback` closes 127.0.0.1 of the host; routes that the outer user
//! namespace owns, and that no step can change, close the host's other addresses and the link-local range.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStderr, Command, Stdio};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, pipe2};

use super::sys;
use super::wire::{Network, SetupError, SlotSpec};

/// slirp4netns is ready in 20 ms; without access to `/dev/net/tun` it fails or hangs.
const READY_TIMEOUT_MS: u16 = 5_000;
/// Its complaints are one or two lines.
const MAX_SAID_BYTES: usize = 1024;
/// slirp4netns' fixed addresses: the gateway, and a resolver that asks the host's own.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// See [`GATEWAY`].
pub(crate) const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// Never part of a build's world: link-local, where clouds serve credentials, and "this host".
const ALWAYS_BLOCKED: [Network; 2] = [
    Network { address: Ipv4Addr::new(169, 254, 0, 0), prefix: 16 },
    Network { address: Ipv4Addr::UNSPECIFIED, prefix: 8 },
];
/// Both halves of the address space: more specific than the default route, which they replace.
const EVERYTHING: [Network; 2] = [
    Network { address: Ipv4Addr::UNSPECIFIED, prefix: 1 },
    Network { address: Ipv4Addr::new(128, 0, 0, 0), prefix: 1 },
];

/// A running slirp4netns. It ends when this is dropped: its exit descriptor closes.
pub(super) struct Slirp {
    child: Child,
    _exit: OwnedFd,
}

impl Slirp {
    /// Connects the network namespace of `pid`, or says why not within [`READY_TIMEOUT_MS`].
    pub(super) fn start(pid: Pid) -> Result<Self, SetupError> {
        let failed = |e: nix::errno::Errno| SetupError::network("make pipes for slirp4netns", e);
        let (ready, ready_write) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        let (exit_read, exit) = pipe2(OFlag::O_CLOEXEC).map_err(failed)?;
        for fd in [&ready_write, &exit_read] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).map_err(failed)?;
        }
        let mut child = spawn(pid, &ready_write, &exit_read)?;
        drop((ready_write, exit_read));
        match wait_ready(&ready) {
            Ok(()) => Ok(Self { child, _exit: exit }),
            Err(cause) => {
                end(&mut child);
                let said = child.stderr.take().map(said).unwrap_or_default();
                Err(SetupError::network("start slirp4netns", format!("{cause}{said}")))
            }
        }
    }
}

impl Slirp {
    /// Sends the signal that ends it; dropping it waits for that end.
    pub(super) fn kill(&mut self) {
        kill_group(&self.child);
    }
}

/// It may have forked: its sandbox does.
fn kill_group(child: &Child) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // An error means that it ended already.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

fn end(child: &mut Child) {
    kill_group(child);
    // Only the direct child is ours to wait for, and it is dead.
    let _ = child.wait();
}

/// What it wrote so far, without waiting for more.
fn said(mut stderr: ChildStderr) -> String {
    use std::io::Read as _;
    let _ = fcntl(&stderr, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
    let mut bytes = [0; MAX_SAID_BYTES];
    let count = stderr.read(&mut bytes).unwrap_or(0);
    let text = String::from_utf8_lossy(&bytes[..count]);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

impl Drop for Slirp {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the slot owns this process: it is killed and reaped by its owner"
)]
fn spawn(pid: Pid, ready: &OwnedFd, exit: &OwnedFd) -> Result<Child, SetupError> {
    Command::new("slirp4netns")
        .args([
            "--configure",
            "--mtu=65520",
            "--disable-host-loopback",
            "--enable-sandbox",
            "--enable-seccomp",
        ])
        .arg(format!("--ready-fd={}", ready.as_raw_fd()))
        .arg(format!("--exit-fd={}", exit.as_raw_fd()))
        .arg(pid.to_string())
        .arg("tap0")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(|e| SetupError::network("run slirp4netns", e))
}

fn wait_ready(ready: &OwnedFd) -> Result<(), String> {
    let mut fds = [PollFd::new(ready.as_fd(), PollFlags::POLLIN)];
    let count = poll(&mut fds, PollTimeout::from(READY_TIMEOUT_MS)).map_err(|e| e.to_string())?;
    if count == 0 {
        return Err(format!("no answer within {READY_TIMEOUT_MS} ms"));
    }
    let mut byte = [0; 1];
    match nix::unistd::read(ready, &mut byte) {
        Ok(1) => Ok(()),
        Ok(_) => Err("it ended: ".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Every address of this host: a connection to one of them would end at the host itself.
pub(crate) fn host_networks() -> nix::Result<Vec<Network>> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    let addresses = interfaces.filter_map(|i| Some(i.address?.as_sockaddr_in()?.ip()));
    let foreign = addresses.filter(|a| !a.is_loopback());
    Ok(foreign.map(|address| Network { address, prefix: 32 }).collect())
}

/// Brings the slot's loopback up. Every network namespace of ours starts with it.
pub(super) fn loopback_up() -> Result<(), SetupError> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let failed = |e: std::io::Error| SetupError::network("bring the loopback interface up", e);
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| failed(e.into()))?;
    sys::loopback_up(socket.as_fd()).map_err(failed)
}

/// Installs the prohibited routes, and the allowed ones if the operator restricts the network.
pub(super) fn restrict(spec: &SlotSpec) -> Result<(), SetupError> {
    let mut routes = Routes::open()?;
    for network in ALWAYS_BLOCKED.iter().chain(&spec.blocked) {
        routes.prohibit(*network)?;
    }
    match &spec.allowed {
        Some(allowed) if !allowed.iter().any(|network| network.prefix == 0) => {
            // First the allowed ones: a route that is already there is kept, also if it is half of everything.
            allowed.iter().try_for_each(|network| routes.via_gateway(*network))?;
            EVERYTHING.iter().try_for_each(|network| routes.prohibit(*network))
        }
        Some(_) | None => Ok(()),
    }
}

/// Whether the network lies in a range that no build reaches, so that allowing it would be a lie.
pub(crate) fn is_never_reached(network: Network) -> bool {
    let inside = |outer: &Network| {
        let mask = u32::MAX.checked_shl(32 - u32::from(outer.prefix)).unwrap_or(0);
        network.prefix >= outer.prefix && u32::from(network.address) & mask == u32::from(outer.address) & mask
    };
    network.address.is_loopback() || ALWAYS_BLOCKED.iter().any(inside)
}

struct Routes(Socket);

impl Routes {
    fn open() -> Result<Self, SetupError> {
        let failed = |e: std::io::Error| SetupError::network("open the routing socket", e);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self(socket))
    }

    fn prohibit(&mut self, network: Network) -> Result<(), SetupError> {
        self.add(network, RouteType::Prohibit, None)
    }

    fn via_gateway(&mut self, network: Network) -> Result<(), SetupError> {
        self.add(network, RouteType::Unicast, Some(GATEWAY))
    }

    fn add(
        &mut self,
        network: Network,
        kind: RouteType,
        gateway: Option<Ipv4Addr>,
    ) -> Result<(), SetupError> {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: netlink_packet_route::AddressFamily::Inet,
            destination_prefix_length: network.prefix,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Static,
            scope: RouteScope::Universe,
            kind,
            ..RouteHeader::default()
        };
        message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(network.address)));
        message.attributes.extend(gateway.map(|g| RouteAttribute::Gateway(RouteAddress::Inet(g))));
        self.request(RouteNetlinkMessage::NewRoute(message)).or_else(|error| {
            if let Some(libc::EEXIST) = error.raw_os_error() {
                Ok(())
            } else {
                let what = format!("route {}/{} as {kind:?}", network.address, network.prefix);
                Err(SetupError::network(what, error))
            }
        })
    }

    fn request(&mut self, message: RouteNetlinkMessage) -> std::io::Result<()> {
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        packet.finalize();
        let mut buffer = vec![0; packet.buffer_len()];
        packet.serialize(&mut buffer);
        self.0.send(&buffer, 0)?;
        let (answer, _) = self.0.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(|e| std::io::Error::other(e.to_string()))?;
        match answer.payload {
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(()),
        }
    }
}
