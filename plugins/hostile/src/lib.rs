//! A plugin that misbehaves on request: its setting `mode` says how. The tests of the host load it.

use std::sync::atomic::{AtomicU32, Ordering};

#[allow(missing_docs, unreachable_pub, clippy::pedantic, reason = "generated from the contract")]
mod bindings {
    wit_bindgen::generate!({ world: "everything", path: "../../wit/v1" });
}

use bindings::exports::kiln::plugin::{post_push, pre_build, setup};
use bindings::kiln::plugin::effects::Report;
use bindings::kiln::plugin::host::{self, Level};
use bindings::kiln::plugin::input::{Build, Image};
use bindings::kiln::plugin::types::{Fault, Page, Position, Verdict, Violation, Wait};

const MIB: usize = 1024 * 1024;

/// How often this instance was called.
static CALLS: AtomicU32 = AtomicU32::new(0);

struct Hostile;

fn mode_of(settings: &str) -> String {
    let settings: serde_json::Value = serde_json::from_str(settings).unwrap_or_default();
    settings["mode"].as_str().unwrap_or("allow").to_owned()
}

fn violation(message: String) -> Violation {
    let at = Some(Position { line: 1, column: 1 });
    Violation { rule: "hostile".to_owned(), message, severity: "error".to_owned(), at, help_url: None }
}

impl setup::Guest for Hostile {
    fn validate_settings(settings: String) -> Result<(), Vec<Violation>> {
        match mode_of(&settings).as_str() {
            "refuse-settings" => Err(vec![violation("mode: this mode is refused".to_owned())]),
            "spin-in-settings" => spin(),
            "trap-in-settings" => panic!("settings"),
            _ => Ok(()),
        }
    }
}

impl pre_build::Guest for Hostile {
    fn check(build: &Build, report: &Report) -> Result<Verdict, Fault> {
        let calls = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
        report.note("calls", &calls.to_string());
        let mode = mode_of(&host::settings());
        if let Some(verdict) = talk(&mode, build, report) {
            return Ok(verdict);
        }
        match mode.as_str() {
            "deny" => Ok(Verdict::Deny(vec![violation("no".to_owned())])),
            "fault" => Err(Fault::Other("cannot say".to_owned())),
            "defer-forever" => Ok(Verdict::Defer(Wait { retry_after_ms: 0, reason: "later".to_owned() })),
            "read-ungranted" => build.read_context_file("secret.txt", 100).map(|_| Verdict::Allow),
            "read-granted" => read_granted(build),
            "escape" => Ok(escape()),
            other => Ok(consume(other)),
        }
    }
}

impl post_push::Guest for Hostile {
    fn check(image: &Image, report: &Report) -> Result<Verdict, Fault> {
        match mode_of(&host::settings()).as_str() {
            "read-beside-layers" => {
                let other = format!("sha256:{}", "0".repeat(64));
                return image.open_layer(&other).map(|_| Verdict::Allow);
            }
            "deny-image" => return Ok(Verdict::Deny(vec![violation("not this image".to_owned())])),
            _ => {}
        }
        report.note("manifest", &String::from_utf8_lossy(&image.manifest()));
        report.note("config", &String::from_utf8_lossy(&image.config()));
        for layer in image.layers() {
            let blob = image.open_layer(&layer.digest)?;
            let head = blob.read(0, 4)?;
            let behind = blob.read(blob.size(), 4)?.len() + blob.read(u64::MAX, 4)?.len();
            report.note(&layer.digest, &format!("{head:?} {behind} {}", image.build().tags().join(" ")));
        }
        Ok(Verdict::Allow)
    }
}

fn read_granted(build: &Build) -> Result<Verdict, Fault> {
    let all = Page { offset: 0, limit: u32::MAX };
    let paths: Vec<String> = build.context_files("**/*.json", all).into_iter().map(|f| f.path).collect();
    let content = build.read_context_file("app/package.json", 5)?;
    let content = String::from_utf8_lossy(&content).into_owned();
    Ok(Verdict::Deny(vec![violation(format!("{} {content}", paths.join(",")))]))
}

/// Modes that misuse what the host offers.
fn talk(mode: &str, build: &Build, report: &Report) -> Option<Verdict> {
    match mode {
        "huge-output" => Some(Verdict::Deny(vec![violation("x".repeat(32 * MIB))])),
        "long-message" => Some(Verdict::Deny(vec![violation("x".repeat(MIB))])),
        "many-violations" => Some(Verdict::Deny(vec![violation("x".to_owned()); 20_000])),
        "escape-codes" => Some(Verdict::Deny(vec![violation("\u{1b}[2Jgone\r\u{9b}1m".to_owned())])),
        "endless-host-calls" => loop {
            let _ = build.build_id();
        },
        "log-flood" => {
            for _ in 0..1000 {
                host::log(Level::Info, &"x".repeat(1000), &[]);
            }
            Some(Verdict::Allow)
        }
        "warn-flood" => loop {
            report.warn(&violation("x".to_owned()));
        },
        "note-flood" => loop {
            report.note("key", &"x".repeat(1000));
        },
        "keep-handles" => {
            let mut kept = Vec::new();
            loop {
                kept.extend(build.instructions());
            }
        }
        _ => None,
    }
}

/// Modes that only burn something.
fn consume(mode: &str) -> Verdict {
    match mode {
        "spin" => spin(),
        "memory" => {
            let mut kept: Vec<Vec<u8>> = Vec::new();
            loop {
                kept.push(vec![1; MIB]);
            }
        }
        "trap" => panic!("on purpose"),
        "recursion" => say(&depth(1).to_string()),
        "exit" => std::process::exit(0),
        "sleep" => std::thread::sleep(std::time::Duration::from_mins(10)),
        "print-flood" => (0..100_000).for_each(|line| println!("{line}")),
        _ => {}
    }
    Verdict::Allow
}

fn say(message: &str) {
    host::log(Level::Error, message, &[]);
}

fn spin() -> ! {
    let mut x = 1_u64;
    loop {
        x = std::hint::black_box(x.wrapping_mul(3));
    }
}

fn depth(n: u64) -> u64 {
    let frame = std::hint::black_box([n; 64]);
    if frame[0] == 0 { 0 } else { depth(n + 1) + frame[63] }
}

/// Tries every way out that the standard library knows; allows only if none is open.
fn escape() -> Verdict {
    let open = [
        ("environment", std::env::vars().next().is_some()),
        ("arguments", std::env::args().next().is_some()),
        ("files", std::fs::read_dir("/").is_ok() || std::fs::read("/etc/hostname").is_ok()),
        ("writing", std::fs::write("out", "x").is_ok()),
    ];
    let found: Vec<Violation> =
        open.iter().filter(|(_, open)| *open).map(|(way, _)| violation((*way).to_owned())).collect();
    if found.is_empty() { Verdict::Allow } else { Verdict::Deny(found) }
}

bindings::export!(Hostile with_types_in bindings);
