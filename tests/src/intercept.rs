//! A forward proxy as companies have them: it opens TLS with certificates of its own authority (shell).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use tempfile::TempDir;

use crate::http::Head;
use crate::process::run;
use crate::site::Listening;

/// openssl makes a key and a certificate in 50 ms.
const OPENSSL: Duration = Duration::from_secs(20);

/// Signs what it is asked to sign.
#[derive(Debug)]
pub struct Authority(TempDir);

impl Authority {
    /// A new one that nobody trusts.
    pub fn new() -> Self {
        let authority = Self(tempfile::Builder::new().prefix("kiln-ca-").tempdir().unwrap());
        authority.openssl(
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
             -subj '/CN=Kiln test interception' -keyout ca.key -out ca.pem",
        );
        authority
    }

    /// Its certificate.
    pub fn certificate(&self) -> PathBuf {
        self.0.path().join("ca.pem")
    }

    fn openssl(&self, script: &str) {
        let mut command = Command::new("/bin/sh");
        let _ = run(command.args(["-e", "-c", script]).current_dir(self.0.path()), OPENSSL).expect_code(0);
    }

    /// A certificate for one host.
    fn mint(&self, host: &str) -> ServerConfig {
        let kind = if host.parse::<Ipv4Addr>().is_ok() { "IP" } else { "DNS" };
        self.openssl(&format!(
            "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj '/CN={host}' \
               -keyout '{host}.key' -out '{host}.csr'\n\
             printf 'subjectAltName={kind}:{host}\\nbasicConstraints=CA:FALSE\\n' > '{host}.ext'\n\
             openssl x509 -req -days 2 -in '{host}.csr' -CA ca.pem -CAkey ca.key -CAcreateserial \
               -extfile '{host}.ext' -out '{host}.pem'\n"
        ));
        let path = |end: &str| self.0.path().join(format!("{host}.{end}"));
        let chain = CertificateDer::pem_file_iter(path("pem")).unwrap();
        let chain = chain.collect::<Result<Vec<_>, _>>().unwrap();
        let key = PrivateKeyDer::from_pem_file(path("key")).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let versions = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        versions.unwrap().with_no_client_auth().with_single_cert(chain, key).unwrap()
    }
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

/// A running proxy. Only it knows where the hosts are.
#[derive(Debug)]
pub struct InterceptingProxy {
    listening: Listening,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    authority: Authority,
    hosts: BTreeMap<String, SocketAddr>,
    minted: Mutex<BTreeMap<String, Arc<ServerConfig>>>,
    requests: Mutex<Vec<String>>,
}

impl InterceptingProxy {
    /// Listens there; `hosts` are reached over plain HTTP at their addresses, all others do not exist.
    pub fn start(listen: SocketAddr, hosts: &[(&str, SocketAddr)]) -> Self {
        let hosts = hosts.iter().map(|(host, address)| ((*host).to_owned(), *address)).collect();
        let (minted, requests) = (Mutex::default(), Mutex::default());
        let shared = Arc::new(Shared { authority: Authority::new(), hosts, minted, requests });
        let theirs = Arc::clone(&shared);
        let listening = Listening::start(listen, move |client| {
            // A client that refuses our certificate is a part of the tests.
            let _ = theirs.serve(client);
        });
        Self { listening, shared }
    }

    /// `http://ADDRESS:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.listening.address())
    }

    /// The authority's certificate.
    pub fn ca(&self) -> PathBuf {
        self.shared.authority.certificate()
    }

    /// Method and address of every request so far, as the proxy sees it after it opened TLS.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// How many requests so far contain `text`.
    pub fn count(&self, text: &str) -> usize {
        self.requests().iter().filter(|line| line.contains(text)).count()
    }
}

impl Shared {
    fn serve(&self, mut client: TcpStream) -> std::io::Result<()> {
        let Some(head) = Head::read(&mut BufReader::new(&client)) else { return Ok(()) };
        let Some(authority) = head.first().strip_prefix("CONNECT ") else {
            return self.plain(&head, &client);
        };
        let host = host_of(authority);
        self.note("CONNECT", host);
        if !self.hosts.contains_key(host) {
            return refuse(&mut client);
        }
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")?;
        let tls = ServerConnection::new(self.config(host)).map_err(std::io::Error::other)?;
        let mut stream = BufReader::new(StreamOwned::new(tls, client));
        let Some(head) = Head::read(&mut stream) else { return Ok(()) };
        let path = head.first().split(' ').nth(1).unwrap_or("/").to_owned();
        self.forward("https", host, &path, &head, stream.get_mut())?;
        stream.get_mut().conn.send_close_notify();
        stream.get_mut().flush()
    }

    /// `GET http://host/path HTTP/1.1`.
    fn plain(&self, head: &Head, mut client: &TcpStream) -> std::io::Result<()> {
        let url = head.first().split(' ').nth(1).unwrap_or_default();
        let Some(rest) = url.strip_prefix("http://") else { return refuse(&mut client) };
        let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        self.forward("http", host_of(host), path, head, &mut client)
    }

    fn forward(
        &self,
        scheme: &str,
        host: &str,
        path: &str,
        head: &Head,
        client: &mut impl Write,
    ) -> std::io::Result<()> {
        let method = head.first().split(' ').next().unwrap_or_default();
        self.note(method, &format!("{scheme}://{host}{path}"));
        let Some(address) = self.hosts.get(host) else { return refuse(client) };
        let mut server = TcpStream::connect(address)?;
        let kept = ["connection:", "proxy-", "accept-encoding:"];
        let kept = |line: &&String| !kept.iter().any(|name| line.to_ascii_lowercase().starts_with(name));
        let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
        head.lines.iter().skip(1).filter(kept).for_each(|line| request.extend([line, "\r\n"]));
        server.write_all(format!("{request}\r\n").as_bytes())?;
        copy_answer(&mut BufReader::new(server), client)
    }

    fn config(&self, host: &str) -> Arc<ServerConfig> {
        let mut minted = self.minted.lock().unwrap();
        let made = minted.entry(host.to_owned()).or_insert_with(|| Arc::new(self.authority.mint(host)));
        Arc::clone(made)
    }

    fn note(&self, method: &str, address: &str) {
        self.requests.lock().unwrap().push(format!("{method} {address}"));
    }
}

fn copy_answer(server: &mut impl BufRead, client: &mut impl Write) -> std::io::Result<()> {
    std::io::copy(&mut server.take(u64::MAX), client)?;
    client.flush()
}

/// Without the port.
fn host_of(authority: &str) -> &str {
    authority.split([':', ' ']).next().unwrap_or(authority)
}

fn refuse(client: &mut impl Write) -> std::io::Result<()> {
    client.write_all(b"HTTP/1.1 502 Unknown host\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
}

/// Whether a file contains a certificate, byte for byte or as its encoded lines.
pub fn contains_certificate(bytes: &[u8], certificate: &Path) -> bool {
    let pem = std::fs::read_to_string(certificate).unwrap();
    // Any line of the body but the last is 64 characters of base64.
    let line = pem.lines().nth(2).unwrap();
    bytes.windows(line.len()).any(|window| window == line.as_bytes())
}
