//! The hostile neighbour of `soak hostile`, to be run by `freeflow run`: `hostile SEED`.

fn main() -> std::process::ExitCode {
    let seed = std::env::args().nth(1).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    match freeflow_tests::soak::neighbour::main(seed) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(why) => {
            println!("wrong {why}");
            std::process::ExitCode::FAILURE
        }
    }
}
