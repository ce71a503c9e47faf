export function robotTab() {}
