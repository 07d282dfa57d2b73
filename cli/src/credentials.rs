//! Finds registry credentials where other tools leave them (edge).
//!
//! Everything stays in this process: helper programs run here, only for the registries that this build uses,
//! and what is found is handed to the agent in memory. No message quotes a file or a helper's output.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kiln_agent::registry::{Credential, Credentials, normalise_key};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

/// Bytes of the largest credential file; those in the wild have a few KiB.
const FILE_LIMIT: u64 = 1024 * 1024;
/// Bytes of the longest answer of a helper; tokens reach some KiB.
const HELPER_OUTPUT_LIMIT: u64 = 64 * 1024;
/// Room for a helper that asks a cloud service, not for one that waits for a person.
const HELPER_TIMEOUT: Duration = Duration::from_secs(10);
const HELPER_PREFIX: &str = "docker-credential-";
/// What helpers print on stdout when they have nothing; part of their protocol.
const HELPER_HAS_NONE: &str = "credentials not found in native keychain";
/// The key under which Docker's own helpers file Docker Hub.
const DOCKER_HUB_URL: &str = "https://index.docker.io/v1/";
const DOCKER_HUB: &str = "docker.io";
/// The user name with which helpers mark an identity token.
const TOKEN_USER: &str = "<token>";

/// Reads a variable of the environment.
pub(crate) type Environment<'a> = &'a (dyn Fn(&str) -> Option<OsString> + Sync);

/// Why credentials could not be read. A missing credential is not an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CredentialError {
    #[error("cannot read the credential file {}", .file.display())]
    Read {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the credential file {} is longer than {FILE_LIMIT} bytes", .file.display())]
    TooLong { file: PathBuf },
    #[error("the credential file {} is not valid at line {line}, column {column}", .file.display())]
    Syntax { file: PathBuf, line: usize, column: usize },
    #[error("{}: `auth` of \"{key}\" in auths is not base64 of user:password", .file.display())]
    Auth { file: PathBuf, key: String },
    #[error("{}: {key}: `{name}` is not the plain name of a helper", .file.display())]
    HelperName { file: PathBuf, key: String, name: String },
    #[error("{}: {key}: cannot run {HELPER_PREFIX}{name}; install it, remove the key or pass --authfile", .file.display())]
    HelperStart {
        file: PathBuf,
        key: String,
        name: String,
        #[source]
        source: io::Error,
    },
    #[error("{}: {key}: {HELPER_PREFIX}{name} {problem}; try `{HELPER_PREFIX}{name} get` by hand or pass --authfile", .file.display())]
    Helper { file: PathBuf, key: String, name: String, problem: String },
}

/// A credential file, Docker's or that of the containers tools.
#[derive(Default, Deserialize)]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, AuthEntry>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
    #[serde(default, rename = "credsStore")]
    store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

/// Credentials for `names` (`host[:port]/repository`). A file that the user named must exist and is the only
/// one; else the first file that knows a name wins.
pub(crate) async fn load(
    authfile: Option<&Path>,
    environment: Environment<'_>,
    names: &[String],
) -> Result<Credentials, CredentialError> {
    let mut search = Search {
        path: environment("PATH"),
        missing: names.iter().map(|name| normalise_key(name)).collect(),
        found: Credentials::default(),
    };
    let (files, required) = files(authfile, environment);
    for file in files {
        if let Some(content) = read(&file, required)? {
            search.add(&file, &content).await?;
        }
    }
    Ok(search.found)
}

/// What was found, and for which names nothing was found yet.
struct Search {
    path: Option<OsString>,
    missing: Vec<String>,
    found: Credentials,
}

impl Search {
    async fn add(&mut self, file: &Path, content: &AuthFile) -> Result<(), CredentialError> {
        let hosts: BTreeSet<_> = self.missing.iter().map(|name| host_of(name).to_owned()).collect();
        for host in hosts {
            self.add_host(file, content, &host).await?;
        }
        let found = &self.found;
        self.missing.retain(|name| found.lookup(name).is_none());
        Ok(())
    }

    /// The most specific source first: a helper for this host, what is written down, a helper for all.
    async fn add_host(&mut self, file: &Path, content: &AuthFile, host: &str) -> Result<(), CredentialError> {
        if let Some(helper) = content.helper(file, host) {
            self.ask(&helper, host).await?;
        }
        for (key, entry) in content.auths.iter().filter(|(key, _)| host_of(&normalise_key(key)) == host) {
            if let Some(credential) = entry.credential(file, key)? {
                self.found.insert(key, credential);
            }
        }
        let mut names = self.missing.iter().filter(|name| host_of(name) == host);
        match content.store_helper(file, host) {
            Some(helper) if names.any(|name| self.found.lookup(name).is_none()) => {
                self.ask(&helper, host).await
            }
            _ => Ok(()),
        }
    }

    async fn ask(&mut self, helper: &Helper<'_>, host: &str) -> Result<(), CredentialError> {
        if let Some(credential) = helper.get(self.path.as_deref()).await? {
            self.found.insert(host, credential);
        }
        Ok(())
    }
}

fn host_of(name: &str) -> &str {
    name.split('/').next().unwrap_or(name)
}

/// Where to look, and whether the file must exist.
fn files(authfile: Option<&Path>, environment: Environment<'_>) -> (Vec<PathBuf>, bool) {
    let variable = |name: &str| environment(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let named = authfile.map(Path::to_owned).or_else(|| variable("REGISTRY_AUTH_FILE"));
    if let Some(named) = named {
        return (vec![named], true);
    }
    let home = variable("HOME");
    let in_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let runtime = variable("XDG_RUNTIME_DIR").map(|runtime| runtime.join("containers/auth.json"));
    let docker = variable("DOCKER_CONFIG").or_else(|| in_home(".docker"));
    let docker = docker.map(|docker| docker.join("config.json"));
    let all = [runtime, in_home(".config/containers/auth.json"), docker];
    (all.into_iter().flatten().collect(), false)
}

fn read(file: &Path, required: bool) -> Result<Option<AuthFile>, CredentialError> {
    let opened = match File::open(file) {
        Err(error) if !required && error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened,
    };
    let mut bytes = Vec::new();
    let read = opened.and_then(|opened| opened.take(FILE_LIMIT + 1).read_to_end(&mut bytes));
    read.map_err(|source| CredentialError::Read { file: file.to_owned(), source })?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(CredentialError::TooLong { file: file.to_owned() });
    }
    if bytes.trim_ascii().is_empty() {
        return Ok(Some(AuthFile::default()));
    }
    // The parser's own message would quote the file.
    let parsed = serde_json::from_slice(&bytes);
    parsed.map(Some).map_err(|error| CredentialError::Syntax {
        file: file.to_owned(),
        line: error.line(),
        column: error.column(),
    })
}

impl AuthFile {
    fn helper<'a>(&'a self, file: &'a Path, host: &str) -> Option<Helper<'a>> {
        let (server, name) = self.helpers.iter().find(|(key, _)| normalise_key(key) == host)?;
        let key = format!("credHelpers \"{server}\"");
        Some(Helper { file, key, name, server: server.clone() })
    }

    fn store_helper<'a>(&'a self, file: &'a Path, host: &str) -> Option<Helper<'a>> {
        let server = if host == DOCKER_HUB { DOCKER_HUB_URL } else { host };
        let helper =
            Helper { file, key: "credsStore".to_owned(), name: &self.store, server: server.to_owned() };
        (!self.store.is_empty()).then_some(helper)
    }
}

impl AuthEntry {
    /// `None` for the empty entries that Docker leaves when a helper keeps the secret.
    fn credential(&self, file: &Path, key: &str) -> Result<Option<Credential>, CredentialError> {
        if !self.identitytoken.is_empty() {
            return Ok(Some(Credential::IdentityToken(self.identitytoken.clone())));
        }
        if self.auth.is_empty() {
            return Ok(password(&self.username, &self.password));
        }
        let wrong = || CredentialError::Auth { file: file.to_owned(), key: key.to_owned() };
        let decoded = STANDARD.decode(self.auth.trim()).map_err(|_| wrong())?;
        let decoded = String::from_utf8(decoded).map_err(|_| wrong())?;
        let (username, secret) = decoded.split_once(':').ok_or_else(wrong)?;
        // Some writers pad with zeros.
        Ok(password(username, secret.trim_end_matches('\0')))
    }
}

fn password(username: &str, password: &str) -> Option<Credential> {
    let (username, password) = (username.to_owned(), password.to_owned());
    let there = !username.is_empty() && !password.is_empty();
    there.then_some(Credential::Password { username, password })
}

/// A program that keeps secrets, and where its name stands.
struct Helper<'a> {
    file: &'a Path,
    key: String,
    name: &'a str,
    server: String,
}

impl Helper<'_> {
    async fn get(&self, path: Option<&OsStr>) -> Result<Option<Credential>, CredentialError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if self.name.is_empty() || !self.name.chars().all(plain) {
            let (file, key, name) = (self.file.to_owned(), self.key.clone(), self.name.to_owned());
            return Err(CredentialError::HelperName { file, key, name });
        }
        let mut child = self.start(path.unwrap_or_default())?;
        let ended = tokio::time::timeout(HELPER_TIMEOUT, self.talk(&mut child)).await;
        let timed_out = || self.failed(format!("did not answer within {HELPER_TIMEOUT:?}"));
        // Dropping the child kills it.
        ended.unwrap_or_else(|_| Err(timed_out()))
    }

    #[expect(clippy::disallowed_methods, reason = "a client-side helper that ends with this function")]
    fn start(&self, path: &OsStr) -> Result<Child, CredentialError> {
        let started = Command::new(format!("{HELPER_PREFIX}{}", self.name))
            .arg("get")
            .env("PATH", path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn();
        started.map_err(|source| CredentialError::HelperStart {
            file: self.file.to_owned(),
            key: self.key.clone(),
            name: self.name.to_owned(),
            source,
        })
    }

    async fn talk(&self, child: &mut Child) -> Result<Option<Credential>, CredentialError> {
        if let Some(mut stdin) = child.stdin.take() {
            // A helper that does not read its input shows that by its exit code.
            let _ = stdin.write_all(self.server.as_bytes()).await;
        }
        let output = match child.stdout.take() {
            Some(stdout) => self.read(stdout).await?,
            None => Vec::new(),
        };
        let status = child.wait().await.map_err(|error| self.failed(format!("is lost: {error}")))?;
        if status.success() {
            return self.parse(&output);
        }
        let none = String::from_utf8_lossy(&output).contains(HELPER_HAS_NONE);
        if none { Ok(None) } else { Err(self.failed(format!("failed ({status})"))) }
    }

    async fn read(&self, stdout: impl AsyncRead + Unpin) -> Result<Vec<u8>, CredentialError> {
        let mut output = Vec::new();
        let read = stdout.take(HELPER_OUTPUT_LIMIT + 1).read_to_end(&mut output).await;
        read.map_err(|error| self.failed(format!("cannot be read: {error}")))?;
        if output.len() as u64 > HELPER_OUTPUT_LIMIT {
            return Err(self.failed(format!("printed more than {HELPER_OUTPUT_LIMIT} bytes")));
        }
        Ok(output)
    }

    fn parse(&self, output: &[u8]) -> Result<Option<Credential>, CredentialError> {
        // The parser's own message would quote the secret.
        let answer: HelperAnswer =
            serde_json::from_slice(output).map_err(|_| self.failed("printed no credential".to_owned()))?;
        Ok(match answer.username.as_str() {
            TOKEN_USER if !answer.secret.is_empty() => Some(Credential::IdentityToken(answer.secret)),
            username => password(username, &answer.secret),
        })
    }

    fn failed(&self, problem: String) -> CredentialError {
        let (file, key, name) = (self.file.to_owned(), self.key.clone(), self.name.to_owned());
        CredentialError::Helper { file, key, name, problem }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::time::Instant;

    const SECRET: &str = "hunter2-canary";

    /// A home with files and helper programs.
    struct Home(tempfile::TempDir);

    impl Home {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn write(&self, name: &str, text: &str) -> PathBuf {
            let path = self.0.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        }

        /// Another process writes the program: one that this process had open for writing could be inherited
        /// by a helper that a parallel test starts, and would then be too busy to run.
        fn helper(&self, name: &str, script: &str) {
            let text = self.write("script", &format!("#!/bin/sh\n{script}\n"));
            let program = self.0.path().join(format!("bin/{HELPER_PREFIX}{name}"));
            let install = std::process::Command::new("install").arg("-D").arg(text).arg(program).status();
            assert!(install.unwrap().success());
        }

        /// `pairs` are variables that name paths below this home.
        async fn load(&self, pairs: &[(&str, &str)], names: &[&str]) -> Result<Credentials, CredentialError> {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            let root = self.0.path();
            let environment = |name: &str| {
                let pair = pairs.iter().find(|(key, _)| *key == name);
                match (pair, name) {
                    (Some((_, value)), _) => Some(root.join(value).into()),
                    (None, "HOME") => Some(root.into()),
                    (None, "PATH") => Some(format!("{}:/usr/bin:/bin", root.join("bin").display()).into()),
                    _ => None,
                }
            };
            load(None, &environment, &names).await
        }
    }

    fn auth(user: &str, secret: &str) -> String {
        format!(r#"{{"auth":"{}"}}"#, STANDARD.encode(format!("{user}:{secret}")))
    }

    #[tokio::test]
    async fn files_are_asked_in_order_until_one_knows_the_name() {
        let home = Home::new();
        let runtime = format!(r#"{{"auths":{{"a.corp/team":{}}}}}"#, auth("run", "1"));
        home.write("run/containers/auth.json", &runtime);
        let config = format!(r#"{{"auths":{{"a.corp":{}}}}}"#, auth("conf", "2"));
        home.write(".config/containers/auth.json", &config);
        let docker = format!(
            r#"{{"auths":{{"https://index.docker.io/v1/":{},"a.corp":{}}},"HttpHeaders":{{}}}}"#,
            auth("hub", "3:with:colons\0\0"),
            auth("docker", "4")
        );
        home.write(".docker/config.json", &docker);
        let names = ["a.corp/team/app", "a.corp/other", "docker.io/library/alpine", "b.corp/x"];
        let found = home.load(&[("XDG_RUNTIME_DIR", "run")], &names).await.unwrap();
        assert_eq!(found.lookup(names[0]).cloned(), password("run", "1"));
        assert_eq!(found.lookup(names[1]).cloned(), password("conf", "2"));
        assert_eq!(found.lookup(names[2]).cloned(), password("hub", "3:with:colons"));
        assert_eq!(found.lookup(names[3]), None);
        let found = home.load(&[("DOCKER_CONFIG", "nowhere")], &["docker.io/library/alpine"]).await.unwrap();
        assert!(found.is_empty());
    }

    #[tokio::test]
    async fn a_named_file_is_the_only_one_and_must_exist() {
        let home = Home::new();
        let file = |user: &str| format!(r#"{{"auths":{{"a.corp":{}}}}}"#, auth(user, "p"));
        home.write(".docker/config.json", &file("docker"));
        home.write("named.json", "");
        let found = home.load(&[("REGISTRY_AUTH_FILE", "named.json")], &["a.corp/x"]).await.unwrap();
        assert!(found.is_empty());
        let error = home.load(&[("REGISTRY_AUTH_FILE", "gone.json")], &["a.corp/x"]).await.unwrap_err();
        assert!(error.to_string().contains("gone.json"), "{error}");
        let named = home.write("flag.json", &file("flag"));
        let environment = |name: &str| (name == "REGISTRY_AUTH_FILE").then(|| "/nowhere".into());
        let found = load(Some(&named), &environment, &["a.corp/x".to_owned()]).await.unwrap();
        assert_eq!(found.lookup("a.corp/x").cloned(), password("flag", "p"));
    }

    #[tokio::test]
    async fn every_form_of_an_entry_is_read() {
        let token = r#"{"auth":"dTpw","identitytoken":"t"}"#;
        for (entry, expected) in [
            (auth("u", "p"), password("u", "p")),
            (r#"{"username":"u","password":"p"}"#.to_owned(), password("u", "p")),
            (token.to_owned(), Some(Credential::IdentityToken("t".into()))),
            ("{}".to_owned(), None),
            (auth("u", ""), None),
        ] {
            let home = Home::new();
            home.write(".docker/config.json", &format!(r#"{{"auths":{{"a.corp":{entry}}}}}"#));
            let found = home.load(&[], &["a.corp/x"]).await.unwrap();
            assert_eq!(found.lookup("a.corp/x").cloned(), expected, "{entry}");
        }
    }

    #[tokio::test]
    async fn errors_name_file_and_key_and_no_secret() {
        let entry = |auth: &str| format!(r#"{{"auths":{{"a.corp":{{"auth":"{auth}"}}}}}}"#);
        for (text, words) in [
            (format!(r#"{{"auths":{{"a.corp":"{SECRET}"}}}}"#), "line 1"),
            (entry(&format!("{SECRET}!")), "\"a.corp\" in auths"),
            (entry(&STANDARD.encode(SECRET)), "\"a.corp\" in auths"),
            (r#"{"credHelpers":{"a.corp":"../x"}}"#.to_owned(), "credHelpers \"a.corp\": `../x`"),
            (r#"{"credHelpers":{"a.corp":""}}"#.to_owned(), "plain name"),
            (r#"{"credsStore":"absent"}"#.to_owned(), "credsStore: cannot run docker-credential-absent"),
            (" ".repeat(1024 * 1024 + 1), "longer than"),
        ] {
            let home = Home::new();
            home.write(".docker/config.json", &text);
            let error = home.load(&[], &["a.corp/x"]).await.unwrap_err();
            let shown = error.to_string();
            assert!(shown.contains(words) && shown.contains("config.json"), "{shown}");
            assert!(!format!("{error} {error:?}").contains(SECRET), "{error:?}");
        }
    }

    #[tokio::test]
    async fn helpers_run_only_for_registries_in_use() {
        let home = Home::new();
        let answer = r#"echo '{"ServerURL":"x","Username":"u","Secret":"'$1-$s'"}'"#;
        home.helper("mine", &format!(r#"read s; echo "$s" >> "$0.log"; {answer}"#));
        home.helper("token", r#"echo '{"Username":"<token>","Secret":"t"}'"#);
        home.helper("none", r#"echo "credentials not found in native keychain"; exit 1"#);
        let helpers = r#""a.corp":"mine","t.corp":"token","unused.corp":"../bad""#;
        let file = format!(r#"{{"credHelpers":{{{helpers}}},"credsStore":"mine"}}"#);
        home.write(".docker/config.json", &file);
        let names = ["a.corp/x", "a.corp/y", "t.corp/x", "docker.io/library/x"];
        let found = home.load(&[], &names).await.unwrap();
        assert_eq!(found.lookup("a.corp/y").cloned(), password("u", "get-a.corp"));
        assert_eq!(found.lookup("t.corp/x").cloned(), Some(Credential::IdentityToken("t".into())));
        let hub = password("u", &format!("get-{DOCKER_HUB_URL}"));
        assert_eq!(found.lookup("docker.io/library/x").cloned(), hub);
        let log = fs::read_to_string(home.0.path().join("bin/docker-credential-mine.log")).unwrap();
        assert_eq!(log.lines().collect::<Vec<_>>(), ["a.corp", DOCKER_HUB_URL]);

        let written = format!(r#"{{"credsStore":"none","auths":{{"b.corp":{}}}}}"#, auth("b", "p"));
        home.write(".docker/config.json", &written);
        let found = home.load(&[], &["a.corp/x", "b.corp/x"]).await.unwrap();
        assert_eq!(found.lookup("a.corp/x"), None);
        assert_eq!(found.lookup("b.corp/x").cloned(), password("b", "p"));
    }

    #[tokio::test]
    async fn helpers_that_misbehave_are_named_and_not_quoted() {
        for (script, words) in [
            (format!("echo {SECRET}; exit 3"), "failed (exit status: 3)"),
            (format!("echo {SECRET}"), "printed no credential"),
            ("head -c 100000 /dev/zero".to_owned(), "printed more than 65536 bytes"),
        ] {
            let home = Home::new();
            home.helper("odd", &script);
            home.write(".docker/config.json", r#"{"credHelpers":{"a.corp":"odd"}}"#);
            let error = home.load(&[], &["a.corp/x"]).await.unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("credHelpers \"a.corp\""), "{error}");
            assert!(!error.contains(SECRET), "{error}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_killed() {
        let home = Home::new();
        home.helper("slow", r#"echo $$ > "$0.pid"; exec sleep 1000"#);
        home.write(".docker/config.json", r#"{"credsStore":"slow"}"#);
        let start = Instant::now();
        let error = home.load(&[], &["a.corp/x"]).await.unwrap_err().to_string();
        assert!(error.contains("did not answer within 10s"), "{error}");
        let pid = fs::read_to_string(home.0.path().join("bin/docker-credential-slow.pid")).unwrap();
        let process = PathBuf::from(format!("/proc/{}", pid.trim()));
        while process.exists() {
            assert!(start.elapsed() < HELPER_TIMEOUT * 2, "the helper is alive");
            tokio::task::yield_now().await;
        }
    }
}
