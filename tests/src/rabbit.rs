//! A real RabbitMQ server of one's own: own node, folders, ports and port mapper, on the loopback only (shell).

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::process::{Outcome, Server, run};
use crate::registry::make_certificates;

/// Where Debian keeps the programs themselves; those in the search path change the user.
const PROGRAMS: &str = "/usr/lib/rabbitmq/bin";
/// A server boots in 5 to 10 s; a busy machine takes longer.
const START: Duration = Duration::from_secs(90);
/// What `rabbitmqctl` needs, most of it to start.
const CONTROL: Duration = Duration::from_mins(1);
/// What the server says when its ports are open and its definitions are there.
const READY: &str = "completed with";

/// A running server. It keeps its folder and its ports when it is killed and started again.
#[derive(Debug)]
pub struct Rabbit {
    dir: TempDir,
    plain: SocketAddr,
    tls: SocketAddr,
    environment: Vec<(String, String)>,
    server: Option<Server>,
    _mapper: Server,
}

impl Rabbit {
    /// Starts a server with these users, whose passwords are their names, in the virtual host `/`.
    pub fn start(users: &[&str]) -> Self {
        let dir = tempfile::Builder::new().prefix("kiln-rabbit-").tempdir().unwrap();
        let [plain, tls, distribution, mapper] = ports();
        let environment = environment(dir.path(), distribution.port(), mapper.port());
        configure(dir.path(), plain, tls, users);
        let port = mapper.port().to_string();
        let mapper = Server::start("epmd", &["-address", "127.0.0.1", "-port", &port]);
        let mut rabbit = Self { dir, plain, tls, environment, server: None, _mapper: mapper };
        rabbit.boot();
        rabbit
    }

    /// Where it listens without TLS.
    pub fn address(&self) -> SocketAddr {
        self.plain
    }

    /// How a user reaches it.
    pub fn url(&self, user: &str) -> String {
        url(self.plain, user)
    }

    /// How a user reaches it with TLS.
    pub fn tls_url(&self, user: &str) -> String {
        format!("amqps://{user}:{user}@{}/%2f", self.tls)
    }

    /// The authority of its certificate.
    pub fn ca(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Kills it with SIGKILL and waits for its end.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Starts it, on what the last one left.
    pub fn boot(&mut self) {
        let variables = self.variables();
        let program = format!("{PROGRAMS}/rabbitmq-server");
        let mut arguments: Vec<&str> = variables.iter().map(String::as_str).collect();
        arguments.push(&program);
        let server = Server::start("env", &arguments);
        assert!(server.output.wait_for(READY, START), "RabbitMQ did not start:\n{}", server.output.text());
        self.server = Some(server);
    }

    /// Runs `rabbitmqctl`.
    pub fn control(&self, arguments: &[&str]) -> Outcome {
        let mut command = Command::new("env");
        command
            .args(self.variables())
            .arg(format!("{PROGRAMS}/rabbitmqctl"))
            .args(["--quiet"])
            .args(arguments);
        run(&mut command, CONTROL).expect_code(0)
    }

    fn variables(&self) -> Vec<String> {
        self.environment.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }
}

/// How a user reaches a server behind this address.
pub fn url(address: SocketAddr, user: &str) -> String {
    format!("amqp://{user}:{user}@{address}/%2f")
}

/// Ports that are free now.
fn ports<const N: usize>() -> [SocketAddr; N] {
    let listeners = [(); N].map(|()| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    listeners.map(|listener| listener.local_addr().unwrap())
}

fn environment(dir: &Path, distribution: u16, mapper: u16) -> Vec<(String, String)> {
    let path = |name: &str| dir.join(name).display().to_string();
    let loopback = "-kernel inet_dist_use_interface {127,0,0,1}";
    // The port names the node: two nodes of one name on one machine would know each other.
    let node = format!("kiln{distribution}@localhost");
    let pairs = [
        ("HOME", path("")),
        ("RABBITMQ_NODENAME", node),
        ("RABBITMQ_MNESIA_BASE", path("data")),
        ("RABBITMQ_LOG_BASE", path("log")),
        ("RABBITMQ_LOGS", "-".to_owned()),
        ("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf")),
        ("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins")),
        ("RABBITMQ_CONF_ENV_FILE", path("none")),
        ("RABBITMQ_DIST_PORT", distribution.to_string()),
        ("ERL_EPMD_PORT", mapper.to_string()),
        ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
        // The Erlang machine instead of a shell that would outlive it.
        ("RABBITMQ_ALLOW_INPUT", "1".to_owned()),
        ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", format!("-noinput {loopback}")),
        ("RABBITMQ_CTL_ERL_ARGS", loopback.to_owned()),
    ];
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn configure(dir: &Path, plain: SocketAddr, tls: SocketAddr, users: &[&str]) {
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).unwrap();
    make_certificates(dir);
    write("plugins", "[].".to_owned());
    write("advanced.config", "[].".to_owned());
    write("definitions.json", definitions(users).to_string());
    let here = dir.display();
    write(
        "rabbitmq.conf",
        format!(
            "listeners.tcp.1 = {plain}\n\
             listeners.ssl.1 = {tls}\n\
             ssl_options.certfile = {here}/server.pem\n\
             ssl_options.keyfile = {here}/server.key\n\
             ssl_options.verify = verify_none\n\
             load_definitions = {here}/definitions.json\n\
             vm_memory_high_watermark.absolute = 2GB\n\
             disk_free_limit.absolute = 50MB\n"
        ),
    );
}

fn definitions(users: &[&str]) -> Value {
    let user = |name: &&str| json!({ "name": name, "password": name, "tags": "" });
    let all =
        |name: &&str| json!({ "user": name, "vhost": "/", "configure": ".*", "write": ".*", "read": ".*" });
    json!({
        "vhosts": [{ "name": "/" }],
        "users": users.iter().map(user).collect::<Value>(),
        "permissions": users.iter().map(all).collect::<Value>(),
    })
}
