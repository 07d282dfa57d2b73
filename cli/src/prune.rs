//! `kiln prune` (edge).

use kiln_agent::executor::chain;
use kiln_agent::housekeeping::{self, Pruned};

use crate::app::Exit;
use crate::args::PruneArgs;
use crate::paths;

/// Runs the command.
pub(crate) fn run(args: &PruneArgs) -> Result<u8, Exit> {
    let agent = paths::open_agent(paths::load_config(&args.places)?, &paths::data_dir(&args.places)?)?;
    let runtime = paths::runtime()?;
    let failed = |e| Exit::system(chain(&e));
    let reclaimed = runtime.block_on(housekeeping::reclaim(&agent)).map_err(failed)?;
    let pruned = runtime.block_on(housekeeping::prune(&agent, args.all)).map_err(failed)?;
    report(reclaimed, &pruned);
    Ok(0)
}

#[expect(clippy::print_stdout, reason = "the edge speaks to the user")]
fn report(reclaimed: usize, pruned: &Pruned) {
    println!("deleted {reclaimed} jobs of killed builds");
    println!("deleted {} base images and {} bytes of blobs", pruned.bases, pruned.blob_bytes);
    println!("deleted {} generations of cache mounts and {} logs", pruned.cache_generations, pruned.logs);
}
