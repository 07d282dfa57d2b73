//! `kiln config` checks a file, shows what holds, and prints the schema.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use kiln_tests::kiln::binary;
use kiln_tests::process::{Outcome, run};

const LIMIT: Duration = Duration::from_mins(1);

fn config(home: &Path, arguments: &[&str]) -> Outcome {
    let mut command = Command::new(binary());
    command.env_clear().env("HOME", home).arg("config").args(arguments);
    run(&mut command, LIMIT)
}

#[test]
fn a_file_is_checked_shown_and_described() {
    let home = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = home.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let ask = |arguments: &[&str]| config(home.path(), arguments);
    let _ = ask(&["check"]).expect_code(0).expect_text(&["the defaults hold"]);
    let broken = file("broken.toml", "[build]\ntiemout = \"2h\"\n");
    for action in ["check", "show"] {
        let wanted = [&format!("{broken}:2: build.tiemout: unknown field"), "did you mean `timeout`?"];
        let _ = ask(&[action, &broken]).expect_code(2).expect_text(&wanted);
    }
    let pointing = file("pointing.toml", "[build]\nca = \"/nowhere/ca.pem\"\n");
    let wanted = format!("{pointing}:2: build.ca: /nowhere/ca.pem cannot be read");
    let _ = ask(&["check", &pointing]).expect_code(2).expect_text(&[&wanted]);
    let good = file("good.toml", "[build]\ntimeout = \"2h\"\nproxy.http = \"http://me:hunter2@proxy\"\n");
    let _ = ask(&["check", &good]).expect_code(0).expect_text(&["good.toml: fine"]);
    let shown = ask(&["show", &good]).expect_code(0);
    let shown = shown.expect_text(&["timeout = \"2h\"", "http://me:***@proxy", "[orchestrator.retention]"]);
    assert!(!shown.stdout.contains("hunter2"));
    let again = file("again.toml", &shown.stdout);
    let _ = ask(&["check", &again]).expect_code(0);
    let schema = ask(&["schema"]).expect_code(0);
    assert_eq!(schema.stdout, include_str!("../../docs/kiln.schema.json"));
}
