//! `kiln dead` (edge).

use kiln_protocol::api::{BuildSummary, PAGE};

use super::args::{DeadCommand, ReplayArgs};
use super::query::{ask, change, pages, print_builds, show};
use crate::app::Exit;

/// Dead letters that are listed: more need another answer than a list.
const MAX_ROWS: usize = 50 * PAGE as usize;

/// Runs the command.
pub(crate) fn run(command: &DeadCommand) -> Result<u8, Exit> {
    match command {
        DeadCommand::Ls(args) => {
            let dead: Vec<BuildSummary> =
                ask(&args.whom, async |server| pages(server, "/dead?", MAX_ROWS).await)?;
            print_builds(&dead, args.shape)
        }
        DeadCommand::Show(args) => show(args),
        DeadCommand::Replay(ReplayArgs { take_head, which }) => {
            change(which, &format!("replay?take_head={take_head}"))
        }
        DeadCommand::Discard(args) => change(args, "discard"),
    }
}
